"""The picture is XML, its bars are as long as what they show, and all have one scale."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from shim.gritctl import picture
from shim.gritctl.picture import Bars

SVG = "{http://www.w3.org/2000/svg}"


def rectangles(svg: str) -> dict[str, float]:
    """The width of each bar's part, by what its hint says."""
    found = {}
    for one in ElementTree.fromstring(svg).iter(f"{SVG}rect"):
        hint = one.find(f"{SVG}title")
        if hint is not None and hint.text:
            found[hint.text] = float(one.attrib["width"])
    return found


def test_lengths_say_what_the_numbers_say() -> None:
    one = Bars("one", {"GPU memory": 3 << 30, "anonymous": 1 << 30}, {"dump": 2.0})
    two = Bars("two", {"GPU memory": 2 << 30}, {"dump": 0.5, "checksums": 0.25})
    widths = rectangles(picture.svg([one, two]))
    gib = widths["anonymous: 1.0 GiB"]
    assert widths["GPU memory: 3.0 GiB"] == pytest.approx(3 * gib, abs=0.2)
    assert widths["GPU memory: 2.0 GiB"] == pytest.approx(2 * gib, abs=0.2)
    assert widths["dump: 500 ms"] == pytest.approx(widths["dump: 2.0 s"] / 4, abs=0.2)
    assert 0 < 4 * gib < picture.WIDTH


def test_names_are_text_and_unknown_kinds_have_colours() -> None:
    odd = Bars('a <&> "b" ' + "x" * 60, {f"kind <{n}>": 1 for n in range(9)}, {})
    svg = picture.svg([odd])
    assert len(rectangles(svg)) == 9
    assert "not known" in "".join(ElementTree.fromstring(svg).itertext())
