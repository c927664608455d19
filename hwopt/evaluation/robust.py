"""Both models under corruption and attack, side by side: rows for report.json."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from hwopt.errors import HwoptError, ToolchainError, UsageError
from hwopt.evaluation.attacks import Attacker, attack_order, box_of
from hwopt.evaluation.corruptions import CHARACTERS, corrupted
from hwopt.evaluation.letters import misspelled
from hwopt.evaluation.outputs import Pair, comparison_data, pair_of, scores_of
from hwopt.evaluation.pixels import pixels_of
from hwopt.evaluation.subject import Subject
from hwopt.plan.options import Progress
from hwopt.samples import Samples, checked

Refused = list[dict[str, str]]


@dataclass(frozen=True)
class Trials:
    """What is tried: corruptions by severity, attacks within epsilon (a share of the input's range)."""

    corruptions: tuple[str, ...] = ()
    severities: tuple[int, ...] = (1, 2, 3, 4, 5)
    attacks: tuple[str, ...] = ()
    epsilon: float = 2 / 255
    steps: int = 10
    seed: int = 0


def check_trials(trials: Trials, samples: Samples) -> None:
    """Before long work: raise UsageError for what the data cannot be used for, ToolchainError for attacks without torch."""
    if CHARACTERS in trials.corruptions and (samples.texts is None or samples.encode is None):
        reason = "noise on characters needs the texts and what makes token numbers of them"
        hint = "give a dataset with a column of texts, or an .npz with `texts`, and ,tokenizer=module:function"
        raise UsageError(reason, place=f"--robustness {CHARACTERS}", hint=hint)
    if trials.attacks and importlib.util.find_spec("torch") is None:
        raise ToolchainError("needs torch, which is not installed", place="--attack", hint="pip install 'hwopt[torch]'")
    if trials.epsilon <= 0 or trials.steps < 1:
        raise UsageError("epsilon and steps must be above zero", place="--epsilon, --steps")


def corruption_rows(subject: Subject, pair: Pair, trials: Trials, progress: Progress, refused: Refused) -> list[dict[str, Any]]:
    """One row for each corruption and severity; what cannot be done goes to `refused` with the reason."""
    samples, metric = judged(pair)
    rows = []
    wanted = [(name, severity) for name in trials.corruptions for severity in trials.severities]
    for place, (name, severity) in enumerate(wanted):
        progress(f"corrupting: {name} {severity}", place, len(wanted))
        if any(one["what"] == name for one in refused):
            continue
        try:
            compared = _compared(subject, _corrupt(subject, samples, name, severity, trials), metric)
        except HwoptError as error:
            refused.append({"what": name, "reason": str(error)})
            continue
        rows.append({"corruption": name, "severity": severity, **compared})
    return rows


def judged(pair: Pair) -> tuple[Samples, str]:
    """The samples with labels, and what the score is called: a classifier without labels is held to its float model's answers."""
    if pair.samples.labels is not None or pair.logits is None:
        return pair.samples, ""
    answers = pair.logits[0].argmax(1)
    return dataclasses.replace(pair.samples, labels=answers), "top-1 agreement with the float model on clean samples"


def _corrupt(subject: Subject, samples: Samples, name: str, severity: int, trials: Trials) -> Samples:
    if name == CHARACTERS and samples.texts is not None and samples.encode is not None:
        texts = misspelled([str(text) for text in samples.texts], severity, trials.seed)
        arrays = {**samples.arrays, **samples.encode(texts)}
        return checked(dataclasses.replace(samples, arrays=MappingProxyType(arrays), texts=np.array(texts)), subject.original)
    pixels = pixels_of(subject.original, samples)
    array = samples.arrays[pixels.name]
    changed = pixels.back(corrupted(pixels.unit(array), name, severity, trials.seed), array)
    return dataclasses.replace(samples, arrays=MappingProxyType({**samples.arrays, pixels.name: changed}))


def _compared(subject: Subject, samples: Samples, metric: str) -> dict[str, Any]:
    pair = pair_of(subject, samples)
    found = comparison_data(*scores_of(subject.original, pair)) | {"divergence": float(pair.divergence.mean())}
    return found | ({"metric": metric} if metric else {})


def attack_rows(subject: Subject, pair: Pair, trials: Trials, progress: Progress, refused: Refused) -> list[dict[str, Any]]:
    """One row for each attack and the model that it is made on; both models are scored on what it made.

    Attacked are the labels, or the float model's own answers where there are none.
    """
    samples, metric = judged(pair)
    if samples.labels is None:
        refused += [{"what": name, "reason": "the model is no classifier: there is no class"} for name in trials.attacks]
        return []
    rows = []
    for attack, side in attack_order(trials.attacks):
        stage = f"{attack} on the {side} model"
        try:
            box = box_of(subject.original, samples, trials.epsilon)
            attacker = Attacker(subject.original if side == "float" else subject.compressed, samples, box)
            made = attacker.attacked(attack, trials.steps, trials.seed, functools.partial(progress, stage))
        except HwoptError as error:
            refused.append({"what": stage, "reason": str(error)})
            continue
        changed = dataclasses.replace(samples, arrays=MappingProxyType({**samples.arrays, box.name: made}))
        row = {"attack": attack, "made_on": side, "epsilon": box.epsilon, "range": [box.low, box.high]}
        rows.append(row | {"steps": trials.steps if attack == "pgd" else 1} | _compared(subject, changed, metric))
    return rows
