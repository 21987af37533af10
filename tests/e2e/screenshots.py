"""Draws the pictures of gritctl in docs/: `python -m tests.e2e.screenshots`. What is to be seen in
them was printed by a real gritctl on a real node; rich only draws the terminal around it."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

from tests.e2e import gpu
from tests.e2e.conftest import running
from tests.nodes.node import Node

DOCS = Path(__file__).resolve().parents[2] / "docs"
DIR = "/var/lib/checkpoints/job"

# Runs a command on a terminal of 100 columns, and prints what it wrote with the time of it.
RECORD = """
import json, os, pty, sys, time
frames = []
def read(fd):
    data = os.read(fd, 65536)
    frames.append((time.monotonic(), data.decode(errors="replace")))
    return data
out = os.dup(1)
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
pty.spawn(sys.argv[1:], read)
os.write(out, json.dumps(frames).encode())
"""
TERMINAL = {"TERM": "xterm-256color", "COLUMNS": "100", "LINES": "40", "COLORTERM": "truecolor"}


def record(node: Node, *words: str) -> list[tuple[float, str]]:
    done = node.run(["python3", "-c", RECORD, *words], env=TERMINAL, timeout=120)
    frames: list[tuple[float, str]] = json.loads(done.stdout)
    return frames


def draw(name: str, command: str, text: str) -> None:
    console = Console(record=True, width=100, file=io.StringIO(), force_terminal=True)
    console.print(Text(f"$ {command}", style="bold"))
    console.print(Text.from_ansi(text.replace("\r", "")))
    console.save_svg(str(DOCS / name), title="gritctl")


def screens(frames: list[tuple[float, str]]) -> list[str]:
    """What stood on the screen, one after the other: rich draws its display anew from its first
    line."""
    text = "".join(data for _, data in frames)
    drawings = re.split(r"(?:\x1b\[1A\x1b\[2K)+", text.replace("\r", ""))
    plain = [re.sub(r"\x1b\[\?25[lh]|\x1b\[2K", "", one).strip("\n") for one in drawings]
    return [one for one in plain if one.strip()]


def main() -> int:
    env = gpu.ENVIRONMENT_OF_GRIT
    with running("forky", binds=gpu.kit_binds(), env=env) as node:
        gpu.grit_as_runc(node)
        board = gpu.gpu_of(node, capacity=512 << 20)
        gpu.configure(node)
        words = ["--bytes", str(256 << 20), "--cpu-bytes", str(192 << 20)]
        gpu.Job(node, board, "job", *words).run()
        board.fault("speed=120000000")
        command = f"gritctl checkpoint job --to {DIR}"
        frames = record(node, *command.split())
        every = screens(frames)
        dumping = [one for one in every if "dump" in one and "rootfs" not in one]
        draw("gritctl-checkpoint-under-way.svg", command, dumping[len(dumping) // 2])
        draw("gritctl-checkpoint.svg", command, every[-1])
        show = f"gritctl show {DIR}"
        draw("gritctl-show.svg", show, "".join(data for _, data in record(node, *show.split())))
        node.run(["gritctl", "show", "--plot", "/var/tmp/plot.svg", DIR])
        (DOCS / "gritctl-plot.svg").write_text(node.path("/var/tmp/plot.svg").read_text())
        doctor = "gritctl doctor"
        frames = record(node, "gritctl", "doctor")
        draw("gritctl-doctor.svg", doctor, "".join(data for _, data in frames))
    return 0


if __name__ == "__main__":
    sys.exit(main())
