"""What an evaluation found, in the lines that people read first."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Data = Mapping[str, Any]


def summary(report: Data) -> str:
    """The report as text: the score first, then who pays, then how it holds under stress."""
    return "\n".join(_lines(report))


def _lines(report: Data) -> Iterator[str]:
    score = report["score"]
    data = f"{score['samples']} samples of {report['data']['source']}"
    yield f"{report['artifact']} for {report['target']}, {score['metric']} on {data}"
    for name in ("float", "compressed"):
        yield f"  {name:11}{score[name]['score']:.4f}{_interval(score[name]['interval'])}"
    yield f"  drop {score['drop']:+.4f}{_interval(score['drop_interval'], True)}"
    if score["paired_flips"]:
        flips = score["paired_flips"]
        counts = f"{flips['right_to_wrong']} right to wrong, {flips['wrong_to_right']} wrong to right"
        yield f"  paired flips: {counts}, McNemar p = {flips['mcnemar_p']:.3g}"
    if "difference" in report:
        yield from _difference(report["difference"])
    if "calibration" in report:
        yield from _calibration(report["calibration"])
    if "classes" in report:
        yield from _classes(report["classes"])
    yield from _changed(report.get("changed", {}))
    yield from _robustness(report.get("robustness", ()), score)
    for row in report.get("attacks", ()):
        how = f"{row['attack']} made on the {row['made_on']} model, epsilon {row['epsilon']:.3g}"
        yield f"{how}: {_both(row)}"
    yield from (f"refused: {one['what']}: {one['reason']}" for one in report.get("refused", ()))
    yield from (f"note: {note}" for note in report["notes"])


def _interval(ends: Sequence[float] | None, signed: bool = False) -> str:
    sign = "+" if signed else ""
    return f" (95 % interval {ends[0]:{sign}.4f} to {ends[1]:{sign}.4f})" if ends else ""


def _difference(found: Data) -> Iterator[str]:
    what = "KL of the outputs" if found["measure"] == "kl" else "relative squared error of the outputs"
    spread = f"median {found['median']:.3g}, 95th percentile {found['percentile_95']:.3g}, largest {found['largest']:.3g}"
    yield f"{what}: mean {found['mean']:.3g}, {spread}"
    if "flip_rate" in found:
        yield f"flip rate {found['flip_rate']:.4f}{_interval(found['flip_rate_interval'])}: other answers than the float model's"


def _calibration(found: Data) -> Iterator[str]:
    ends = found["ece_change_interval"]
    sides = f"float {found['float']['ece']:.4f}, compressed {found['compressed']['ece']:.4f}"
    yield f"calibration error (ECE, {found['bins']} bins): {sides}, change {found['ece_change']:+.4f}{_interval(ends, True)}"


def _classes(found: Data) -> Iterator[str]:
    if not found["worst"]:
        yield f"no class loses (by {found['by']})"
        return
    rows = {row["name"]: row for row in found["rows"]}
    worst = [rows[name] for name in found["worst"]]
    shown = (f"{row['name']} {row['float']:.2f} -> {row['compressed']:.2f} ({row['samples']})" for row in worst)
    counts = f"{found['losing']} classes lose, {found['gaining']} gain, of {len(rows)} (by {found['by']})"
    sure = found["significant"]
    proven = f"beyond chance (Holm): {', '.join(sure)}" if sure else "none of them beyond chance (Holm)"
    yield f"who pays: {'; '.join(shown)}"
    yield f"  {counts}; {proven}"


def _changed(found: Data) -> Iterator[str]:
    if found.get("rows"):
        some = ", ".join(row.get("file") or str(row["sample"]) for row in found["rows"][:6])
        where = f"; {len(found['rows'])} of them in {found['folder']}" if found.get("folder") else ""
        yield f"most changed samples: {some}{where}"
    if found.get("note"):
        yield f"  {found['note']}"


def _robustness(rows: Sequence[Data], score: Data) -> Iterator[str]:
    groups: dict[str, list[Data]] = defaultdict(list)
    for row in rows:
        groups[row["corruption"]].append(row)
    for name, some in groups.items():
        means = (sum(row[side]["score"] for row in some) / len(some) for side in ("float", "compressed"))
        severities = ",".join(str(row["severity"]) for row in some)
        before, after = means
        extra = f"drop {before - after:+.4f} where clean samples have {score['drop']:+.4f}"
        yield f"{name} (severity {severities}): float {before:.4f}, compressed {after:.4f}, {extra}"


def _both(row: Data) -> str:
    drop = f"drop {row['drop']:+.4f}{_interval(row['drop_interval'], True)}"
    return f"float {row['float']['score']:.4f}, compressed {row['compressed']['score']:.4f}, {drop}"
