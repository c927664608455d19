"""Small scatter charts as inline SVG: linear or logarithmic axes, dots with tooltips, lines."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 560, 340
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 14, 46
TICKS = 5


@dataclass(frozen=True)
class Dot:
    """One point; `label` is written beside it, `tip` appears under the pointer, `hollow` draws its ring only."""

    x: float
    y: float
    color: str
    tip: str = ""
    label: str = ""
    hollow: bool = False


@dataclass(frozen=True)
class Line:
    """A polyline through data points."""

    points: tuple[tuple[float, float], ...]
    color: str
    label: str = ""
    dashed: bool = False


@dataclass(frozen=True)
class Axis:
    """One axis of the data: `low` to `high`, on a length of `size` pixels."""

    title: str
    low: float
    high: float
    logarithmic: bool = False

    def share(self, value: float) -> float:
        """0 at the low end, 1 at the high end; outside values are moved to the border."""
        low, high = (math.log10(self.low), math.log10(self.high)) if self.logarithmic else (self.low, self.high)
        at = math.log10(max(value, 1e-300)) if self.logarithmic else value
        return min(max((at - low) / ((high - low) or 1.0), 0.0), 1.0)

    def ticks(self) -> list[float]:
        """Round numbers between the ends."""
        if self.logarithmic:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            step = max(1, -(-(last - first) // (TICKS + 1)))
            parts = (1, 2, 5) if last - first <= 2 else (1,)
            found = [part * 10.0**power for power in range(first, last + 1, step) for part in parts]
            return [value for value in found if self.low <= value <= self.high]
        rough = (self.high - self.low) / TICKS or 1.0
        unit = 10 ** math.floor(math.log10(rough))
        step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
        first = math.ceil(self.low / step - 1e-9)
        return [number * step for number in range(first, math.floor(self.high / step + 1e-9) + 1)]


def axis(title: str, values: Iterable[float], logarithmic: bool = False) -> Axis:
    """An axis with a little room around the values."""
    found = [value for value in values if math.isfinite(value) and (value > 0 or not logarithmic)] or [1.0]
    low, high = min(found), max(found)
    if logarithmic:
        return Axis(title, low / 1.6, high * 1.6, True)
    room = 0.06 * ((high - low) or abs(high) or 1.0)
    return Axis(title, low - room, high + room)


def chart(x: Axis, y: Axis, dots: Sequence[Dot], lines: Sequence[Line] = ()) -> str:
    """The SVG element."""
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{_text(y.title)} over {_text(x.title)}">']
    parts += [*_grid(x, y), *(_line(x, y, line) for line in lines), *(_dot(x, y, dot) for dot in dots), "</svg>"]
    return "\n".join(parts)


def _grid(x: Axis, y: Axis) -> Iterable[str]:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    for value in x.ticks():
        at = _x(x, value)
        yield f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{bottom}"/>'
        yield f'<text x="{at:.1f}" y="{bottom + 16}" text-anchor="middle">{number(value)}</text>'
    for value in y.ticks():
        at = _y(y, value)
        yield f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}"/>'
        yield f'<text x="{LEFT - 7}" y="{at + 4:.1f}" text-anchor="end">{number(value)}</text>'
    yield f'<text class="title" x="{(LEFT + right) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{_text(x.title)}</text>'
    middle = (TOP + bottom) / 2
    turned = f'transform="rotate(-90 13 {middle})"'
    yield f'<text class="title" x="13" y="{middle}" text-anchor="middle" {turned}>{_text(y.title)}</text>'


def _line(x: Axis, y: Axis, line: Line) -> str:
    path = " ".join(f"{_x(x, a):.1f},{_y(y, b):.1f}" for a, b in line.points)
    dash = ' stroke-dasharray="5 4"' if line.dashed else ""
    drawn = f'<polyline points="{path}" fill="none" stroke="{line.color}" stroke-width="1.5"{dash}/>'
    if not line.label:
        return drawn
    a, b = line.points[-1]
    at, up = _x(x, a), _y(y, b)
    anchor, shift = ("start", 6) if at < WIDTH / 2 else ("end", -4)
    return f'{drawn}<text x="{at + shift:.1f}" y="{up - 5:.1f}" text-anchor="{anchor}">{_text(line.label)}</text>'


def _dot(x: Axis, y: Axis, dot: Dot) -> str:
    at, up = _x(x, dot.x), _y(y, dot.y)
    fill = "var(--paper)" if dot.hollow else dot.color
    drawn = f'<circle cx="{at:.1f}" cy="{up:.1f}" r="4.5" fill="{fill}" stroke="{dot.color}" stroke-width="1.6">'
    drawn += f"<title>{_text(dot.tip or dot.label)}</title></circle>"
    if not dot.label:
        return drawn
    left = at > WIDTH * 0.7
    anchor, shift = ("end", -8) if left else ("start", 8)
    return drawn + f'<text x="{at + shift:.1f}" y="{up - 6:.1f}" text-anchor="{anchor}">{_text(dot.label)}</text>'


def _x(x: Axis, value: float) -> float:
    return LEFT + x.share(value) * (WIDTH - LEFT - RIGHT)


def _y(y: Axis, value: float) -> float:
    return HEIGHT - BOTTOM - y.share(value) * (HEIGHT - TOP - BOTTOM)


def number(value: float) -> str:
    """Three digits, with k, M, G, T for large numbers."""
    for limit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{letter}"
    return f"{value:.3g}"


def _text(value: str) -> str:
    return html.escape(value, quote=True)
