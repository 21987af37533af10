"""From the bench's results to what stands in docs/: the tables between two marks of performance.md,
and the plot. All of it is made of the JSON alone: `python -m tests.bench --from docs/bench.json`.
"""

from __future__ import annotations

import json
import re
import statistics
from typing import TYPE_CHECKING, Any

from tests.bench import chart

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

RESULTS, PLOT, PAGE = "bench.json", "performance.svg", "performance.md"
BEGIN = "<!-- Written by `make bench`, from bench.json. -->"
END = "<!-- The end of what `make bench` writes. -->"

MIB = 1 << 20
FIGURES = {
    "run_detached": "`ctr run -d`, to the running container",
    "run_to_end": "`ctr run --rm`, `/bin/true`, to its end",
    "start": "the shim's `start`",
    "start_cpu": "the shim's `start`, processor time",
    "delete": "the shim's `delete`",
    "state": "State call",
    "checkpoint": "checkpoint of a small container (Pause, Checkpoint, Resume)",
    "memory_1": "memory (PSS) of the daemon, 1 container",
    "memory_10": "memory (PSS) of the daemon, 10 containers in a group",
}
PANELS = {
    "plain": ("CPU memory: {}", {"runc": "runc", "grit": "grit"}),
    "simulated_gpu": (
        "simulated GPU: {}",
        {
            "stock": "stock shim, CRIU's plugin",
            "grit plugin": "grit, plugin",
            "grit driver": "grit, driver",
        },
    ),
}


def write(results: dict[str, Any], docs: Path) -> None:
    """Puts the results and what is made of them into the directory `docs`."""
    text = json.dumps(results, indent=1)
    # A list of numbers is one line.
    text = re.sub(r"\[[^\[\]{}]*\]", lambda found: re.sub(r"\s+", " ", found[0]), text)
    (docs / RESULTS).write_text(text + "\n")
    plot = _plot(results)
    if plot:
        (docs / PLOT).write_text(plot)
    page = docs / PAGE
    before, _, rest = page.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text("\n".join([before + BEGIN, "", markdown(results), END]) + after)


def markdown(results: dict[str, Any]) -> str:
    """The tables."""
    machine = results["machine"]
    memory = machine["memory"] / (1 << 30)
    lines = [
        f"{results['date']}, {machine['cpus']} processors, {memory:.0f} GiB, "
        f"Linux {machine['kernel']}. Load at the beginning {machine['load'][0]:.1f}, at the end "
        f"{machine['load'][1]:.1f}.",
        "",
        "| aim | reached | |",
        "|---|---:|---|",
        *_aims(results),
        "",
    ]
    for name, node in results["weight"].items():
        lines += _weight(f"Node {name}: {node['where']}", node["samples"])
    if results["plain"]:
        lines += ["### CPU memory, beside runc", "", *_dumps(results["plain"], "runc"), ""]
    if results["simulated_gpu"]:
        lines += ["### Simulated GPU, beside CRIU's plugin under the stock shim", ""]
        lines += [*_dumps(results["simulated_gpu"], "stock"), ""]
    if _plot(results):
        lines += [f"![Seconds over size]({PLOT})", ""]
    return "\n".join(lines)


def _aims(results: dict[str, Any]) -> list[str]:
    rows: list[tuple[str, str, bool]] = []
    for name, node in results["weight"].items():
        middle = _medians(node["samples"])
        start = middle("run_detached", "grit") / middle("run_detached", "stock")
        added = (middle("state", "grit") - middle("state", "stock")) * 1e3
        held = max(middle("memory_1", "grit"), middle("memory_10", "grit")) / MIB
        where = f", node {name}"
        rows += [
            (f"`ctr run` at most 1.3 times the stock shim's{where}", f"{start:.2f}", start <= 1.3),
            (f"at most 0.1 ms added to a call{where}", f"{added:.3f} ms", added <= 0.1),
            (f"at most 12 MiB for a group's daemon{where}", f"{held:.1f} MiB", held <= 12),
        ]
    for size, sides in results["plain"].items():
        if isinstance(sides, dict):
            for what in ("checkpoint", "restore"):
                ratio = _median(sides["grit"], what) / _median(sides["runc"], what)
                title = f"{what} of {size} GiB of CPU memory at most 1.1 times runc's"
                rows.append((title, f"{ratio:.2f}", ratio <= 1.1))
    return [f"| {aim} | {value} | {'yes' if true else 'no'} |" for aim, value, true in rows]


def _medians(samples: dict[str, Any]) -> Callable[[str, str], float]:
    return lambda figure, side: float(statistics.median(samples[figure][side]))


def _weight(title: str, samples: dict[str, Any]) -> list[str]:
    middle = _medians(samples)
    lines = [f"| {title} | stock | grit | ratio |", "|---|---:|---:|---:|"]
    for figure, name in FIGURES.items():
        stock, grit = middle(figure, "stock"), middle(figure, "grit")
        shown = _size if figure.startswith("memory") else _time
        lines.append(f"| {name} | {shown(stock)} | {shown(grit)} | {grit / stock:.2f} |")
    rounds = len(samples["run_detached"]["grit"])
    under = " and ".join(_size(samples[f"memory_{n}"]["grit_inner"][0]) for n in (1, 10))
    said = (
        f"Medians of {rounds} rounds, {len(samples['state']['grit'])} calls. Under grit's daemon "
    )
    return [*lines, "", f"{said}stands a stock shim: {under} with 1 and 10 containers.", ""]


def _dumps(by_size: dict[str, Any], base: str) -> list[str]:
    lines = [
        "| memory | side | checkpoint | ratio | restore | ratio | phases of the checkpoint "
        "| daemon at most |",
        "|---:|---|---:|---:|---:|---:|---|---:|",
    ]
    for size, sides in by_size.items():
        if isinstance(sides, str):
            lines.append(f"| {size} GiB | not run: it {sides} | | | | | | |")
            continue
        for side, rounds in sides.items():
            cells = [f"{size} GiB", f"{side} ({len(rounds)})"]
            for what in ("checkpoint", "restore"):
                taken = _median(rounds, what)
                cells += [_time(taken), f"{taken / _median(sides[base], what):.2f}"]
            peak = max(one["peak"] for one in rounds)
            cells += [_phases(rounds), _size(peak) if peak else ""]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def _phases(rounds: list[dict[str, Any]]) -> str:
    names = rounds[0].get("phases", {})
    middles = {name: statistics.median(one["phases"][name] for one in rounds) for name in names}
    return ", ".join(f"{name} {_time(taken)}" for name, taken in middles.items())


def _plot(results: dict[str, Any]) -> str:
    panels = {}
    for part, (title, names) in PANELS.items():
        measured = {
            float(s): sides for s, sides in results[part].items() if isinstance(sides, dict)
        }
        for what in ("checkpoint", "restore") if measured else ():
            panels[title.format(what)] = {
                shown: [
                    (size, [one[what] for one in sides[side]])
                    for size, sides in sorted(measured.items())
                ]
                for side, shown in names.items()
            }
    return chart.svg(panels) if panels else ""


def _median(rounds: list[dict[str, Any]], what: str) -> float:
    return float(statistics.median(one[what] for one in rounds))


def _time(value: float) -> str:
    if value >= 1:
        return f"{value:.2f} s"
    return f"{value * 1e3:.1f} ms" if value >= 0.002 else f"{value * 1e3:.3f} ms"


def _size(value: float) -> str:
    return f"{value / MIB:.1f} MiB"
