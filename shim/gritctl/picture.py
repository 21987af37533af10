"""A picture of where the bytes and the seconds of checkpoints went: SVG, a bar for each checkpoint
and question. Written by hand: bars and words are all there is in it.
"""

from __future__ import annotations

from xml.sax.saxutils import escape, quoteattr

from shim.gritctl import output

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

WIDTH = 960
_LEFT, _RIGHT = 200, 110  # of the bars: room for labels and sums
_BAR, _STEP = 26, 40

# Okabe and Ito's colours, which people with any sight for colours tell apart.
_COLOURS = {
    "GPU memory": "#009E73",
    "anonymous": "#0072B2",
    "heap": "#56B4E9",
    "stack": "#999999",
    "changed pages of files": "#E69F00",
    "shared": "#CC79A7",
    "root file system": "#D55E00",
    "suspend": "#009E73",
    "dump": "#0072B2",
    "checksums": "#E69F00",
}
_OTHERS = ("#56B4E9", "#CC79A7", "#D55E00", "#999999", "#F0E442")


class Bars:
    """One checkpoint: bytes by kind and seconds by phase, each in the order of its bar."""

    def __init__(self, label: str, sizes: dict[str, int], seconds: dict[str, float]) -> None:
        self.label, self.sizes, self.seconds = label, sizes, seconds


def svg(checkpoints: list[Bars]) -> str:
    """The picture. Bars of all checkpoints have one scale, so that they can be compared."""
    parts: list[str] = []
    y = 16.0
    sections: tuple[tuple[str, list[dict[str, float]], Callable[[float], str]], ...] = (
        ("Where the bytes are", [dict(one.sizes) for one in checkpoints], output.size),
        ("Where the time went", [one.seconds for one in checkpoints], output.seconds),
    )
    for title, values, shown in sections:
        y = _section(parts, y, title, [one.label for one in checkpoints], values, shown)
    height = int(y) + 8
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
            f'viewBox="0 0 {WIDTH} {height}" font-size="14" '
            'font-family="DejaVu Sans, Helvetica, Arial, sans-serif">',
            f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
            *parts,
            "</svg>\n",
        ]
    )


def _section(
    parts: list[str],
    y: float,
    title: str,
    labels: list[str],
    values: list[dict[str, float]],
    shown: Callable[[float], str],
) -> float:
    kinds = list(dict.fromkeys(kind for one in values for kind in one))
    colours = _colours(kinds)
    longest = max((sum(one.values()) for one in values), default=0) or 1
    scale = (WIDTH - _LEFT - _RIGHT) / longest
    parts.append(_text(16, y + 16, title, size=18, weight="bold"))
    y += 34
    for label, one in zip(labels, values, strict=True):
        x = float(_LEFT)
        parts.append(_text(_LEFT - 12, y + 18, _short(label), anchor="end", whole=label))
        for kind, value in one.items():
            width = value * scale
            told = f"{kind}: {shown(value)}"
            parts.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0.5):.1f}" height="{_BAR}" '
                f"fill={quoteattr(colours[kind])}><title>{escape(told)}</title></rect>"
            )
            if width > 70:
                parts.append(
                    _text(x + width / 2, y + 18, shown(value), anchor="middle", fill="#fff")
                )
            x += width
        total = shown(sum(one.values())) if one else "not known"
        parts.append(_text(x + 8, y + 18, total, weight="bold"))
        y += _STEP
    x = float(_LEFT)
    for kind in kinds:
        width = 28 + 8.6 * len(kind)
        if x + width > WIDTH:
            x, y = float(_LEFT), y + 22
        colour = quoteattr(colours[kind])
        parts.append(f'<rect x="{x:.1f}" y="{y:.1f}" width="12" height="12" fill={colour}/>')
        parts.append(_text(x + 18, y + 11, kind))
        x += width + 10
    return y + 40


def _colours(kinds: list[str]) -> dict[str, str]:
    others = iter(_OTHERS * (1 + len(kinds) // len(_OTHERS)))
    return {kind: _COLOURS.get(kind) or next(others) for kind in kinds}


def _text(
    x: float,
    y: float,
    text: str,
    *,
    anchor: str = "start",
    size: int = 14,
    weight: str = "normal",
    fill: str = "#222",
    whole: str = "",
) -> str:
    hint = f"<title>{escape(whole)}</title>" if whole and whole != text else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" '
        f'font-weight="{weight}" fill="{fill}">{escape(text)}{hint}</text>'
    )


def _short(label: str) -> str:
    """The end of a path says more than its beginning."""
    return label if len(label) <= 24 else "..." + label[-21:]
