"""report.html: what was decided, layer by layer, with every number and every refusal; no script, no other file."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hwopt.pipeline import parse
from hwopt.plan.plan import Offer, Plan
from hwopt.plugins import find_passes
from hwopt.report.chart import Axis, Dot, Line, axis, chart, number
from hwopt.report.summary import milliseconds, size

Data = Mapping[str, Any]
GRAY, BLUE, GREEN, RED = "#8b929c", "#2f6fde", "#1a8a4f", "#cf3b3b"
COLORS = ("#2f6fde", "#d9822b", "#8e5bd0", "#14958f", "#b8487f", "#6b7d1f")  # one for each family
STYLE = """
:root{--paper:#fff;--ink:#1d2430;--soft:#5d6675;--rule:#e2e6ec;--bar:#c3c9d2}
@media(prefers-color-scheme:dark){:root{--paper:#14181f;--ink:#e6e9ee;--soft:#9aa4b2;--rule:#2b323d;--bar:#4a5361}}
body{font:14px/1.45 system-ui,sans-serif;background:var(--paper);color:var(--ink);max-width:1180px;margin:24px auto;
padding:0 20px}
h1{font-size:22px;margin:0 0 4px}h2{font-size:16px;margin:34px 0 4px}p{margin:2px 0 8px;color:var(--soft);max-width:85ch}
.cards{display:flex;flex-wrap:wrap;gap:12px;margin:16px 0}.card{border:1px solid var(--rule);border-radius:8px;padding:10px 16px}
.card b{display:block;font-size:20px}.card span{color:var(--soft);font-size:12px}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(420px,1fr));gap:20px}svg{width:100%;height:auto;display:block}
svg text{font:11px system-ui,sans-serif;fill:var(--soft)}svg text.title{fill:var(--ink)}.grid{stroke:var(--rule);stroke-width:1}
table{border-collapse:collapse;width:100%}td,th{text-align:left;padding:4px 8px;border-bottom:1px solid var(--rule);
vertical-align:top}th{font-weight:600;color:var(--soft);font-size:12px}td.n{text-align:right;white-space:nowrap}
td.why{overflow-wrap:anywhere}
.bars{min-width:240px;width:34%}.bar{height:9px;border-radius:2px;margin:2px 0;background:var(--bar);min-width:1px}
details summary{cursor:pointer}details td{font-size:12.5px}.taken td{font-weight:600}
.key span{white-space:nowrap;margin-right:10px}
.key i{display:inline-block;width:10px;height:10px;border-radius:2px;margin-right:4px}
"""


def page(report: Data, plan: Plan, front: Sequence[Data] = ()) -> str:
    """The whole document from report.json, plan.json and the points of a Pareto front, if there is one.

    A `report` without measured figures (of `hwopt plan`) leaves those parts out.
    """
    title = f"{report['model']} on {report['target']}"
    parts = [
        f"<h1>{_text(title)}</h1><p>{_text(_setting(report, plan))}</p>", _cards(report, plan),
        '<div class="pair"><section>', *_pareto(report, plan, front), "</section><section>", *_sensitivity(plan),
        '</section></div><div class="pair"><section>', *_roofline(report), "</section><section>", *_fidelity(report, plan),
        "</section></div>", *_layers(report, plan), *_rest(report, plan),
    ]  # fmt: skip
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{_text(title)}</title>'
    body = "\n".join(parts)
    return f"<!DOCTYPE html>\n<html lang=en><head>{head}<style>{STYLE}</style></head><body>\n{body}\n</body></html>\n"


def _setting(report: Data, plan: Plan) -> str:
    limits = ", ".join(f"{name} {value:g}" for name, value in plan.budget.limits().items())
    allowed = f"allowed drop {plan.budget.max_drop:.2%}" + (f", limits: {limits}" if limits else "")
    knobs = f"; {', '.join(f'{k} = {v}' for k, v in plan.knobs.items())}" if plan.knobs else ""
    return f"{report['threads']} thread{'s' if report['threads'] != 1 else ''}, {allowed}, seed {plan.seed}{knobs}"


def _cards(report: Data, plan: Plan) -> str:
    before, after = report["baseline"], report["result"]
    source = "measured" if after["latency_source"] == "measured" else "predicted"
    cards = [
        (f"{milliseconds(before['latency_seconds'])} → {milliseconds(after['latency_seconds'])}", f"latency, {source}"),
        (f"{before['latency_seconds'] / max(after['latency_seconds'], 1e-12):.2f} times", "speed-up"),
        (f"{size(before['weight_bytes'])} → {size(after['weight_bytes'])}", "weights"),
        (f"{size(before['peak_activation_bytes'])} → {size(after['peak_activation_bytes'])}", "peak activations"),
    ]
    if report.get("score_drop") is not None:
        cards.append((f"{before['score']:.4f} → {after['score']:.4f}", f"{report['metric']} ({report['samples']} samples)"))
    if plan.joules_before:
        cards.append((f"{plan.joules_before * 1e3:.3g} → {plan.joules_after * 1e3:.3g} mJ", "energy, predicted"))
    found = "".join(f'<div class="card"><b>{_text(value)}</b><span>{_text(name)}</span></div>' for value, name in cards)
    return f'<div class="cards">{found}</div>'


def _pareto(report: Data, plan: Plan, front: Sequence[Data]) -> Iterator[str]:
    yield "<h2>Score against latency</h2>"
    yield "<p>Every plan that was applied and scored. Rings broke a limit; the line is the allowed drop.</p>"
    dots = [Dot(plan.seconds_before * 1e3, 0.0, GRAY, "unchanged", "unchanged")]
    for index, one in enumerate(plan.rounds, 1):
        tip = f"round {index}: {one.decisions} changes, {one.predicted_seconds * 1e3:.4g} ms, drop {one.drop:.2%}"
        tip += f"; {one.note}" if one.note else ""
        color = BLUE if one.feasible else RED
        dots.append(Dot(one.predicted_seconds * 1e3, one.drop * 100, color, tip, "", not one.feasible))
    if plan.decisions and report.get("score_drop") is not None:
        tip = f"chosen: {plan.seconds_after * 1e3:.4g} ms, drop {report['score_drop']:.2%}"
        dots.append(Dot(plan.seconds_after * 1e3, report["score_drop"] * 100, GREEN, tip, "chosen"))
    path = tuple((point["seconds"] * 1e3, point["drop"] * 100) for point in front)
    dots += [Dot(a, b, COLORS[3], f"front: {a:.4g} ms, drop {b:.3g} points") for a, b in path]
    x = axis("predicted latency [ms]", [dot.x for dot in dots])
    y = axis("drop [points]", [*(dot.y for dot in dots), plan.budget.max_drop * 100])
    allowed = plan.budget.max_drop * 100
    lines = [Line(((x.low, allowed), (x.high, allowed)), RED, "allowed", True)]
    yield chart(x, y, dots, [*lines, Line(path, COLORS[3])] if path else lines)


def _sensitivity(plan: Plan) -> Iterator[str]:
    yield "<h2>What each change would give, and what it would cost</h2>"
    families = _families(plan.offers)
    swatches = "".join(f'<span><i style="background:{color}"></i>{_text(name)}</span> ' for name, color in families.items())
    yield f'<p class="key">Filled: chosen, rings: not chosen. The pointer shows which. {swatches}</p>'
    shown = [offer for offer in plan.offers if offer.seconds > 0 and offer.error > 0]
    dots = [
        Dot(offer.error, offer.seconds * 1e6, families[_family(offer)], f"{offer.text}: error {offer.error:.3g}, saves "
            f"{offer.seconds * 1e6:.3g} us", "", not offer.chosen)
        for offer in sorted(shown, key=lambda one: one.chosen)
    ]  # fmt: skip
    if dots:
        x = axis("error of the outputs (sensitivity)", [dot.x for dot in dots], True)
        yield chart(x, axis("saves alone [us]", [dot.y for dot in dots], True), dots)


def _roofline(report: Data) -> Iterator[str]:
    hardware, rows = report.get("hardware"), [row for row in report["layers"] if row["macs"] and row.get("bytes")]
    if not hardware or not rows:
        return
    yield "<h2>Roofline</h2>"
    faster = hardware.get("clock", 1.0)
    raised = f", at {faster:.3g} times the clock that is stated for it, as measured kernels show" if faster > 1 else ""
    yield f"<p>Each kernel of the result, as it is predicted to run, under the peaks and bandwidths of the target{raised}.</p>"
    threads = report["threads"] if hardware["kind"] == "cpu" else 1
    dots, colors = [], {dtype: COLORS[place % len(COLORS)] for place, dtype in enumerate(hardware["peak"])}
    for row in rows:
        done = 2 * row.get("products", row["macs"])
        intensity, reached = done / row["bytes"], done / row["predicted_seconds"]
        color = colors.get(row["dtype"], GRAY)
        tip = f"{row['name']} ({row['dtype']}): {number(intensity)} op/byte, {number(reached)}op/s"
        dots.append(Dot(intensity, reached / 1e9, color, tip))
    peaks = {dtype: value * threads / 1e9 for dtype, value in hardware["peak"].items()}
    x = axis("operations per byte", [dot.x for dot in dots], True)
    x = Axis(x.title, x.low / 2, x.high * 2, True)
    y = axis("operations per second [G]", [*(dot.y for dot in dots), *peaks.values()], True)
    lines = []
    for dtype, peak in peaks.items():
        lines.append(Line(((x.low, peak), (x.high, peak)), colors[dtype], dtype))
    for memory in hardware["memories"]:
        rate = memory["bytes_per_second"] / 1e9
        ends = [max(x.low, y.low / rate), min(x.high, max(peaks.values()) / rate)]
        if ends[0] < ends[1]:
            lines.append(Line(tuple((at, at * rate) for at in reversed(ends)), GRAY, memory["name"], True))
    yield chart(x, y, dots, lines)


def _fidelity(report: Data, plan: Plan) -> Iterator[str]:
    yield "<h2>Predicted and measured</h2>"
    dots, note = [], "Blue: what the solver's sums and pairs promised against the price of the graph that they made."
    for index, one in enumerate(plan.rounds, 1):
        if one.solved_seconds:
            tip = f"round {index}: solver {one.solved_seconds * 1e3:.4g} ms, graph {one.predicted_seconds * 1e3:.4g} ms"
            dots.append(Dot(one.solved_seconds * 1e3, one.predicted_seconds * 1e3, BLUE, tip))
    if report["result"]["latency_source"] == "measured" and plan.seconds_before:
        note += " Green: predicted against measured on this machine."
        for name, seconds in (("baseline", plan.seconds_before), ("result", plan.seconds_after)):
            found = report[name]["latency_seconds"]
            tip = f"{name}: predicted {seconds * 1e3:.4g} ms, measured {found * 1e3:.4g} ms"
            dots.append(Dot(seconds * 1e3, found * 1e3, GREEN, tip, name))
    if not dots:
        yield "<p>Nothing was searched, so nothing was predicted.</p>"
        return
    yield f"<p>{note} On the line both agree.</p>"
    both = axis("predicted [ms]", [value for dot in dots for value in (dot.x, dot.y)], True)
    line = Line(((both.low, both.low), (both.high, both.high)), GRAY, "", True)
    yield chart(both, Axis("measured, or priced anew [ms]", both.low, both.high, True), dots, [line])


def _layers(report: Data, plan: Plan) -> Iterator[str]:
    yield "<h2>Layers</h2><p>Predicted time before (gray) and after; parts of a layer that was split count to it.</p>"
    rows = _joined(report["layers"])
    widest = max((max(row["before"], row["after"]) for row in rows.values()), default=1.0) or 1.0
    yield "<table><tr><th>layer</th><th>dtype</th><th class=bars>time</th><th>us</th><th>changes and candidates</th></tr>"
    for name, row in rows.items():
        bars = "".join(
            f'<div class="bar" style="width:{100 * row[key] / widest:.1f}%{style}"></div>'
            for key, style in (("before", ""), ("after", f";background:{BLUE if row['changes'] else GREEN}"))
        )
        times = f"{row['before'] * 1e6:.3g} → {row['after'] * 1e6:.3g}"
        yield f"<tr><td>{_text(name)}</td><td>{_text(row['dtype'])}</td><td class=bars>{bars}</td><td class=n>{times}</td>"
        yield f"<td class=why>{_candidates(name, row['changes'], plan)}</td></tr>"
    yield "</table>"


def _joined(layers: Sequence[Data]) -> dict[str, dict[str, Any]]:
    """One row for each layer: `fc1:down` counts to `fc1`."""
    rows: dict[str, dict[str, Any]] = {}
    for layer in layers:
        name = layer["name"].partition(":")[0] if layer["predicted_seconds_before"] is None else layer["name"]
        row = rows.setdefault(name, {"before": 0.0, "after": 0.0, "changes": [], "dtype": layer["dtype"]})
        row["before"] += layer["predicted_seconds_before"] or 0.0
        row["after"] += layer["predicted_seconds"]
        row["changes"] = list(dict.fromkeys([*row["changes"], *layer["changes"]]))
    return rows


def _candidates(name: str, changes: Sequence[str], plan: Plan) -> str:
    """The changes that were made, and behind them everything that was considered here."""
    places = (name, f"channels of {name}")
    here = [offer for offer in plan.offers if offer.group in places]
    reasons = dict(_reason(one.reason) for one in plan.refused if one.site in places)
    rows = [
        (o.text, f"{o.seconds * 1e6:.3g} us", f"{o.error:.2g}", "chosen" if o.chosen else reasons.get(o.text, ""), o.chosen)
        for o in here
    ]
    offered = {offer.text for offer in here}
    rows += [(text, "", "", why, False) for text, why in reasons.items() if text not in offered]
    families = dict.fromkeys(text.partition("{")[0] for text in changes)
    taken = " + ".join(offer.text for offer in here if offer.chosen) or ", ".join(families) or "unchanged"
    if not rows:
        return _text(taken)
    head = "<tr><th>candidate</th><th>saves</th><th>error</th><th>why</th></tr>"
    table = f"<table>{head}{''.join(map(_candidate, rows))}</table>"
    return f"<details><summary>{_text(taken)} <small>({len(rows)})</small></summary>{table}</details>"


def _candidate(row: tuple[str, str, str, str, bool]) -> str:
    text, saves, error, why, chosen = row
    mark = " class=taken" if chosen else ""
    return f"<tr{mark}><td>{_text(text)}</td><td class=n>{saves}</td><td class=n>{error}</td><td>{_text(why)}</td></tr>"


def _reason(text: str) -> tuple[str, str]:
    """(what was refused, why): a reason begins with the candidate, if it is about one."""
    what, colon, why = text.partition(": ")
    return (what, why) if colon and "{" in what else ("", text)


def _rest(report: Data, plan: Plan) -> Iterator[str]:
    """Refusals at places that no kernel is called after, and the notes."""
    shown = {name for row in _joined(report["layers"]) for name in (row, f"channels of {row}")}
    other = [one for one in plan.refused if one.site not in shown]
    if other:
        lines = "".join(f"<tr><td>{_text(o.site)}</td><td>{_text(o.by)}</td><td>{_text(o.reason)}</td></tr>" for o in other)
        count = f"{len(other)} place" + ("s" if len(other) > 1 else "")
        yield f"<h2>Refused elsewhere</h2><details><summary>{count}</summary><table>{lines}</table></details>"
    notes = [*report.get("notes", ()), *plan.notes]
    yield from (f"<p>{_text(note)}</p>" for note in dict.fromkeys(notes))
    machine = report.get("machine", {})
    versions = ", ".join(f"{name} {version}" for name, version in plan.versions.items())
    yield f"<p><small>{_text(machine.get('cpu', ''))} {_text(machine.get('architecture', ''))}; {_text(versions)}</small></p>"


def _families(offers: Sequence[Offer]) -> dict[str, str]:
    names = dict.fromkeys(_family(offer) for offer in offers)
    return {name: COLORS[place % len(COLORS)] for place, name in enumerate(names)}


def _family(offer: Offer) -> str:
    known = find_passes()
    return " + ".join(parse(text, known).name for text in offer.text.split(" + "))


def _text(value: str) -> str:
    return html.escape(str(value), quote=True)
