"""The page of an evaluation: float and compressed side by side in one HTML file, pictures included; no script."""

from __future__ import annotations

import base64
import html
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hwopt.report.chart import Axis, Dot, Line, axis, chart
from hwopt.report.page import BLUE, COLORS, GRAY, STYLE

Data = Mapping[str, Any]
SHOWN = 12  # classes; the others unfold
OWN = """
img{width:112px;image-rendering:pixelated;display:block}figure{margin:0;font-size:12px;width:112px}
.shots{display:flex;flex-wrap:wrap;gap:14px}
"""


def page(report: Data) -> str:
    """The whole document from what evaluate_artifact returns."""
    title = f"{report['artifact']} for {report['target']}: evaluation"
    parts = [
        f"<h1>{_text(title)}</h1><p>{_text(_setting(report))}</p>", _cards(report), '<div class="pair">', *_calibration(report),
        *_robustness(report), "</div>", *_attacks(report), *_classes(report), *_changed(report), *_rest(report),
    ]  # fmt: skip
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{_text(title)}</title>'
    body = "\n".join(parts)
    return f"<!DOCTYPE html>\n<html lang=en><head>{head}<style>{STYLE}{OWN}</style></head><body>\n{body}\n</body></html>\n"


def _setting(report: Data) -> str:
    before = f"; preprocessing: {report['preprocess']}" if report["preprocess"] else ""
    score = report["score"]
    return f"{score['metric']} of the library that ships, {score['samples']} samples of {report['data']['source']}{before}"


def _cards(report: Data) -> str:
    score = report["score"]
    cards = [
        (f"{score['float']['score']:.4f} → {score['compressed']['score']:.4f}", f"{score['metric']}, float → compressed"),
        (f"{score['drop']:+.4f}", f"drop{_interval(score['drop_interval'])}"),
    ]
    if score["paired_flips"]:
        flips = score["paired_flips"]
        told = f"right to wrong / back, McNemar p {flips['mcnemar_p']:.3g}"
        cards.append((f"{flips['right_to_wrong']} / {flips['wrong_to_right']}", told))
    if "difference" in report:
        found = report["difference"]
        cards.append((f"{found['mean']:.3g}", "mean KL" if found["measure"] == "kl" else "relative squared error"))
        if "flip_rate" in found:
            cards.append((f"{found['flip_rate']:.2%}", "answers other than the float model's"))
    if "calibration" in report:
        found = report["calibration"]
        cards.append((f"{found['float']['ece']:.4f} → {found['compressed']['ece']:.4f}", "calibration error (ECE)"))
    shown = "".join(f'<div class="card"><b>{_text(value)}</b><span>{_text(name)}</span></div>' for value, name in cards)
    return f'<div class="cards">{shown}</div>'


def _interval(ends: Sequence[float] | None) -> str:
    return f", 95 % interval {ends[0]:+.4f} to {ends[1]:+.4f}" if ends else ""


def _calibration(report: Data) -> Iterator[str]:
    if "calibration" not in report:
        return
    found = report["calibration"]
    yield "<section><h2>Calibration</h2><p>By bin. Gray: float, blue: compressed; on the line confidence and accuracy agree.</p>"
    dots, lines = [], [Line(((0.0, 0.0), (1.0, 1.0)), GRAY, "", True)]
    for side, color in (("float", GRAY), ("compressed", BLUE)):
        points = tuple((row["confidence"], row["accuracy"]) for row in found[side]["bins"])
        lines.append(Line(points, color))
        dots += [
            Dot(row["confidence"], row["accuracy"], color, f"{side}: {row['samples']} samples, {row['accuracy']:.3f} right")
            for row in found[side]["bins"]
        ]
    yield chart(Axis("confidence", 0.0, 1.0), Axis("accuracy", 0.0, 1.0), dots, lines)
    yield "</section>"


def _robustness(report: Data) -> Iterator[str]:
    rows = report.get("robustness") or []
    if not rows:
        return
    groups: dict[str, list[Data]] = defaultdict(list)
    for row in rows:
        groups[row["corruption"]].append(row)
    colors = {name: COLORS[place % len(COLORS)] for place, name in enumerate(groups)}
    swatches = "".join(f'<span><i style="background:{color}"></i>{_text(name)}</span> ' for name, color in colors.items())
    yield f'<section><h2>Corruptions</h2><p class="key">Dashed: float, solid: compressed. {swatches}</p>'
    lines, dots = [], []
    for name, some in groups.items():
        for side in ("float", "compressed"):
            points = tuple((float(row["severity"]), row[side]["score"]) for row in some)
            lines.append(Line(points, colors[name], "", side == "float"))
            dots += [Dot(x, y, colors[name], f"{name} {x:.0f}, {side}: {y:.4f}", "", side == "float") for x, y in points]
    values = [dot.y for dot in dots] + [report["score"]["float"]["score"]]
    yield chart(Axis("severity", 0.5, 5.5), axis(rows[0]["metric"], values), dots, lines)
    yield "</section>"


def _attacks(report: Data) -> Iterator[str]:
    rows = report.get("attacks") or []
    if not rows:
        return
    heads = "".join(f"<th>{name}</th>" for name in ("attack", "made on", "epsilon", "float", "compressed", "drop"))
    yield f"<h2>Attacks</h2><table><tr>{heads}</tr>"
    for row in rows:
        drop = f"{row['drop']:+.4f}{_interval(row['drop_interval'])}"
        cells = (row["attack"], f"{row['made_on']} model", f"{row['epsilon']:.3g} of {row['range'][0]:g} to {row['range'][1]:g}")
        scores = (f"{row['float']['score']:.4f}", f"{row['compressed']['score']:.4f}", drop)
        yield "<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in (*cells, *scores)) + "</tr>"
    yield "</table>"


def _classes(report: Data) -> Iterator[str]:
    found = report.get("classes")
    if not found:
        return
    sure = f"Beyond chance (Holm): {', '.join(found['significant'])}." if found["significant"] else "None beyond chance (Holm)."
    told = f"By {found['by']}: {found['losing']} classes lose, {found['gaining']} gain. {sure}"
    yield f"<h2>Who pays</h2><p>{_text(told)}</p>"
    names = ("class", "samples", "float", "compressed", "drop", "right to wrong / back", "p")
    head = f"<table><tr>{''.join(f'<th>{name}</th>' for name in names)}</tr>"
    rows = [_class(row) for row in found["rows"]]
    yield f"{head}{''.join(rows[:SHOWN])}</table>"
    if rows[SHOWN:]:
        yield f"<details><summary>{len(rows) - SHOWN} more</summary>{head}{''.join(rows[SHOWN:])}</table></details>"


def _class(row: Data) -> str:
    flips = "" if row["right_to_wrong"] is None else f"{row['right_to_wrong']} / {row['wrong_to_right']}"
    cells = (row["name"], row["samples"], f"{row['float']:.3f}", f"{row['compressed']:.3f}", f"{row['drop']:+.3f}", flips)
    return "<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in (*cells, f"{row['mcnemar_p']:.2g}")) + "</tr>"


def _changed(report: Data) -> Iterator[str]:
    found = report.get("changed") or {}
    if not found.get("rows"):
        return
    yield f"<h2>Most changed samples</h2><p>{_text(found.get('note', ''))}</p><div class=shots>"
    for row in found["rows"]:
        told = ", ".join(f"{key} {row[key]}" for key in ("label", "float", "compressed") if key in row)
        shown = _picture(Path(found["folder"]) / row["picture"]) if "picture" in row else ""
        text = f"<br>{_text(row['text'])}" if "text" in row else ""
        which = row.get("file") or f"sample {row['sample']}"
        yield f"<figure>{shown}{_text(which)}<br>{_text(told)}{text}</figure>"
    yield "</div>"


def _picture(path: Path) -> str:
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">'


def _rest(report: Data) -> Iterator[str]:
    refused = report.get("refused") or []
    if refused:
        rows = "".join(f"<tr><td>{_text(one['what'])}</td><td>{_text(one['reason'])}</td></tr>" for one in refused)
        yield f"<h2>Refused</h2><table>{rows}</table>"
    yield from (f"<p>{_text(note)}</p>" for note in report["notes"])
    machine, versions = report["machine"], ", ".join(f"{name} {value}" for name, value in report["versions"].items())
    yield f"<p><small>{_text(machine.get('cpu', ''))}; {_text(versions)}</small></p>"


def _text(value: Any) -> str:
    return html.escape(str(value), quote=True)
