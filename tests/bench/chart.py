"""Growth with size, drawn: seconds over GiB, a line for each side, a panel for each question. SVG,
written by hand: axes, lines and words are all there is in it.
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape

if TYPE_CHECKING:
    from collections.abc import Sequence

    Points = Sequence[tuple[float, Sequence[float]]]

WIDTH, HEIGHT = 470, 300  # of a panel
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 16, 40, 64
_TICKS = 4
_NAME = 52  # of a size, as it is written

# Okabe and Ito's colours, which people with any sight for colours tell apart.
_COLOURS = ("#999999", "#0072B2", "#D55E00", "#009E73")


def svg(panels: dict[str, dict[str, Points]]) -> str:
    """The picture, two panels in a row. A panel is its title, and by the name of a side its points:
    size in GiB and all seconds measured for it. The line goes through the medians, a bar from the
    fastest to the slowest."""
    parts = []
    for number, (title, sides) in enumerate(panels.items()):
        x, y = number % 2 * WIDTH, number // 2 * HEIGHT
        parts.append(f'<g transform="translate({x} {y})">{_panel(title, sides)}</g>')
    width, height = 2 * WIDTH, -(-len(panels) // 2) * HEIGHT
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-size="13" '
        'font-family="DejaVu Sans, Helvetica, Arial, sans-serif">\n'
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _panel(title: str, sides: dict[str, Points]) -> str:
    largest = max(size for points in sides.values() for size, _ in points)
    longest = _round_up(max(max(taken) for points in sides.values() for _, taken in points))
    across, up = WIDTH - _LEFT - _RIGHT, HEIGHT - _TOP - _BOTTOM

    def at(size: float, seconds: float) -> tuple[float, float]:
        return _LEFT + size / largest * across, _TOP + up - seconds / longest * up

    parts = [_text(_LEFT, 24, title, weight="bold", size=15)]
    for tick in range(_TICKS + 1):
        seconds = longest * tick / _TICKS
        x, y = at(0, seconds)
        parts.append(f'<path d="M{x:.1f} {y:.1f}h{across}" stroke="#dddddd"/>')
        parts.append(_text(x - 6, y + 4, f"{seconds:g}", anchor="end"))
    parts.append(_text(_LEFT - 6, _TOP - 8, "s", anchor="end"))
    named = float(WIDTH) + _NAME
    for size in sorted({size for points in sides.values() for size, _ in points}, reverse=True):
        x, y = at(size, 0)
        if named - x >= _NAME:  # small sizes stand close together
            parts.append(_text(x, y + 18, f"{size:g} GiB", anchor="middle"))
            named = x
    legend = float(_LEFT)
    for (name, points), colour in zip(sides.items(), _COLOURS, strict=False):
        middles = [(size, statistics.median(taken)) for size, taken in points]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in middles))
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for (size, taken), middle in zip(points, middles, strict=True):
            (x, low), (_, high) = at(size, min(taken)), at(size, max(taken))
            told = f"{name}, {size:g} GiB: {middle[1]:.2f} s ({min(taken):.2f} to {max(taken):.2f})"
            parts.append(
                f'<g><title>{escape(told)}</title><path d="M{x:.1f} {low:.1f}V{high:.1f}" '
                f'stroke="{colour}"/><circle cx="{x:.1f}" cy="{at(*middle)[1]:.1f}" r="4" '
                f'fill="{colour}"/></g>'
            )
        parts.append(f'<circle cx="{legend + 5:.1f}" cy="{HEIGHT - 20}" r="5" fill="{colour}"/>')
        parts.append(_text(legend + 16, HEIGHT - 16, name))
        legend += 34 + 8 * len(name)
    return "\n".join(parts)


def _round_up(value: float) -> float:
    """The next of 1, 2, 4, 5 and 8 times a power of ten, which four ticks divide well."""
    power = 0.001
    while True:
        for factor in (1, 2, 4, 5, 8):
            if value <= factor * power:
                return float(f"{factor * power:g}")
        power *= 10


def _text(
    x: float, y: float, text: str, *, anchor: str = "start", size: int = 13, weight: str = "normal"
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" '
        f'font-weight="{weight}" fill="#222">{escape(text)}</text>'
    )
