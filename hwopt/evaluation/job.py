"""hwopt evaluate: everything that is known of a compressed model's answers, as one report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hwopt.artifact import Artifact
from hwopt.compiler import one_blas_thread
from hwopt.errors import DataError
from hwopt.evaluate import compare, user_scorer
from hwopt.evaluation.attacks import STEPS
from hwopt.evaluation.calibration import calibration_data
from hwopt.evaluation.changed import KEEP, changed_rows, check_folder, save_changed
from hwopt.evaluation.classes import class_data
from hwopt.evaluation.outputs import Pair, comparison_data, difference_data, pair_of, scores_of
from hwopt.evaluation.pixels import Pixels, pixels_of
from hwopt.evaluation.robust import Trials, attack_rows, check_trials, corruption_rows
from hwopt.evaluation.subject import Subject, subject_of
from hwopt.job import quiet
from hwopt.plan.options import Progress
from hwopt.plan.search import versions
from hwopt.report.figures import machine
from hwopt.sources import is_scoring, samples_from

FEW = 100  # samples; below, intervals are wide and a note says so


@one_blas_thread
def evaluate_artifact(
    artifact: Artifact | Path | str,
    data: Any,
    *,
    model: Any = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    binds: Mapping[str, Any] | None = None,
    preprocess: str = "",
    robustness: Sequence[str] = (),
    severities: Sequence[int] = (1, 2, 3, 4, 5),
    attacks: Sequence[str] = (),
    epsilon: float = 2 / 255,
    steps: int = STEPS,
    save_changed_to: Path | None = None,
    keep: int = KEEP,
    seed: int = 0,
    progress: Progress = quiet,
) -> dict[str, Any]:
    """The report on an artifact: its library is run on the data, beside the float `model` (or the one that it names).

    `data` is whatever samples_from takes, or `module:function` that scores: then there is a score and nothing else. Labels make
    it an accuracy; without them the float model is the measure. `preprocess` is for libraries that take what pixels become:
    the data are pixels then. `robustness` names corruptions, `attacks` fgsm and pgd, `epsilon` is a share of the input's range.
    Raises HwoptError before long work; what is refused later stands in the report with its reason.
    """
    shipped = artifact if isinstance(artifact, Artifact) else Artifact(artifact)
    check_folder(save_changed_to)
    progress("loading", 0, 1)
    subject = subject_of(shipped, model, shapes or {}, binds or {}, preprocess)
    if is_scoring(data):
        return _head(subject, str(data)) | {"score": _user_score(subject, str(data))}
    samples = samples_from(data, subject.original)
    trials = Trials(tuple(robustness), tuple(severities), tuple(attacks), epsilon, steps, seed)
    check_trials(trials, samples)
    pair = pair_of(subject, samples, lambda done, total: progress("running both models", done, total))
    report = _head(subject, samples.source) | _answers(subject, pair, keep, seed)
    report["data"] |= {"samples": len(pair.samples), "labels": pair.samples.labels is not None, "digest": samples.digest}
    if save_changed_to is not None:
        report["changed"] |= _saved(save_changed_to, report["changed"]["rows"], pair, subject)
    refused: list[dict[str, str]] = []
    report["robustness"] = corruption_rows(subject, pair, trials, progress, refused)
    report["attacks"] = attack_rows(subject, pair, trials, progress, refused)
    return report | {"refused": refused, "notes": [*report["notes"], *_notes(report)]}


def _head(subject: Subject, source: str) -> dict[str, Any]:
    manifest = subject.artifact.manifest
    return {
        "artifact": manifest["name"],
        "target": manifest["target"],
        "library_sha256": manifest["files"].get(manifest["library"], ""),
        "original": manifest.get("original") or {},
        "original_digest": subject.original.digest,
        "preprocess": subject.preprocess,
        "data": {"source": source},
        "notes": list(subject.notes),
        "machine": machine(),
        "versions": versions(),
    }


def _user_score(subject: Subject, name: str) -> dict[str, Any]:
    scorer = user_scorer(name)
    before, after = (scorer(run) for run in (subject.run_original, subject.run_compressed))
    if len(before) != len(after):
        raise DataError(f"returned {len(before)} scores for the float model and {len(after)} for the other", place=name)
    return comparison_data(compare(scorer.metric, before, after), before, after)


def _answers(subject: Subject, pair: Pair, keep: int, seed: int) -> dict[str, Any]:
    comparison, before, after = scores_of(subject.original, pair)
    names, labels = pair.samples.classes, pair.samples.labels
    told: dict[str, Any] = {"score": comparison_data(comparison, before, after), "difference": difference_data(pair)}
    told["changed"] = {"rows": changed_rows(pair, names, keep)}
    if pair.logits is not None:
        groups = pair.logits[0].argmax(1) if labels is None else labels
        told["classes"] = class_data(groups, before, after, names, "the float model's answer" if labels is None else "label")
    if pair.logits is not None and labels is not None:
        told["calibration"] = calibration_data(pair.logits, labels, seed)
    return told


def _saved(folder: Path, rows: list[dict[str, Any]], pair: Pair, subject: Subject) -> dict[str, Any]:
    pixels: Pixels | None = None
    note = ""
    try:
        pixels = pixels_of(subject.original, pair.samples)
    except DataError as error:
        note = f"no pictures were written: {error}"
    return {"files": save_changed(folder, rows, pair, pixels), "folder": str(folder), "note": note}


def _notes(report: Mapping[str, Any]) -> list[str]:
    notes = []
    score = report["score"]
    if score["samples"] < FEW:
        notes.append(f"{score['samples']} samples say little: look at the intervals")
    if report["data"]["labels"] and score["float"]["score"] == 0:
        notes.append("the float model scores 0: are labels and preprocessing right?")
    if not report["data"]["labels"]:
        notes.append("without labels the float model is the measure: its own score is 1 by definition")
    return notes
