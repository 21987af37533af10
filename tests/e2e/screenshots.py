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
    console.print(Text.from_ansi(text))
    console.save_svg(str(DOCS / name), title="gritctl")


def last_screen(frames: list[tuple[float, str]], until: float = 1.0) -> str:
    """What stands on the screen after that share of the time: rich draws its display anew from its
    first line, so the last whole drawing is it."""
    begun, ended = frames[0][0], frames[-1][0]
    text = "".join(data for at, data in frames if at <= begun + (ended - begun) * until)
    drawings = re.split(r"(?:\x1b\[1A\x1b\[2K)+", text.replace("\r", ""))
    whole = [one for one in drawings if one.strip()]
    kept = whole[-1] if until == 1.0 else whole[-2]
    return re.sub(r"\x1b\[\?25[lh]|\x1b\[2K", "", kept).strip("\n")


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
        draw("gritctl-checkpoint-under-way.svg", command, last_screen(frames, 0.55))
        draw("gritctl-checkpoint.svg", command, last_screen(frames))
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
