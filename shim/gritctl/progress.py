"""What a person, a log file or a program sees while a job is under way: bars on a terminal, plain
lines otherwise, or JSON, an event a line.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import contextmanager

import click
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, TextColumn
from rich.text import Text

from shim.gritctl import output

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console
    from rich.progress import Task, TaskID


class Phase:
    """A phase of the job under way. `done` and `total` are bytes, None where they mean nothing;
    `total` may be an estimate."""

    def __init__(self, display: Display, target: str, name: str, total: int | None) -> None:
        self._display = display
        self.target, self.name, self.total = target, name, total
        self.done: int | None = None
        self.began = time.monotonic()
        self.seconds = 0.0

    def at(self, done: int) -> None:
        self.done = done
        self.seconds = time.monotonic() - self.began
        self._display.moved(self)


class Display:
    """Shows nothing; the others show something."""

    @contextmanager
    def phase(self, target: str, name: str, total: int | None = None) -> Iterator[Phase]:
        one = Phase(self, target, name, total)
        self.begun(one)
        try:
            yield one
        except BaseException:
            one.seconds = time.monotonic() - one.began
            self.ended(one, ok=False)
            raise
        one.seconds = time.monotonic() - one.began
        self.ended(one, ok=True)

    def begun(self, phase: Phase) -> None: ...

    def moved(self, phase: Phase) -> None: ...

    def ended(self, phase: Phase, *, ok: bool) -> None: ...

    def say(self, text: str) -> None: ...

    def close(self) -> None: ...


class Lines(Display):
    """A line for each phase when it has ended: for logs and pipes."""

    def ended(self, phase: Phase, *, ok: bool) -> None:
        words = f"{phase.target}: {phase.name}  {output.seconds(phase.seconds)}{_amount(phase)}"
        print(words if ok else f"{words}  failed", flush=True)

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


class Json(Display):
    """An object a line: event (begin, progress, end, say), container, phase, seconds, bytes, total.
    Progress comes at most once a second for each phase."""

    def __init__(self) -> None:
        self._told = 0.0

    def begun(self, phase: Phase) -> None:
        self._told = time.monotonic()
        self._event("begin", phase)

    def moved(self, phase: Phase) -> None:
        if time.monotonic() - self._told >= 1:
            self._told = time.monotonic()
            self._event("progress", phase)

    def ended(self, phase: Phase, *, ok: bool) -> None:
        self._event("end", phase, ok=ok)

    def say(self, text: str) -> None:
        self._write({"event": "say", "text": text})

    def finished(self, **facts: object) -> None:
        """The last line."""
        self._write(facts)

    def _event(self, event: str, phase: Phase, **more: object) -> None:
        self._write(
            {
                "event": event,
                "container": phase.target,
                "phase": phase.name,
                "seconds": round(phase.seconds, 3),
                "bytes": phase.done,
                "total": phase.total,
                **more,
            }
        )

    def _write(self, facts: dict[str, object]) -> None:
        print(json.dumps(facts), flush=True)


class Bars(Display):
    """A bar for each phase on a terminal, with bytes and bytes a second while it is under way."""

    def __init__(self, console: Console | None = None) -> None:
        self.progress = Progress(
            SpinnerColumn(finished_text="[green]✓"),
            TextColumn("{task.fields[target]}", style="bold"),
            TextColumn("{task.description:8}"),
            _Bar(bar_width=30),
            _Amount(),
            console=console or output.console(stderr=True),
            refresh_per_second=10,
        )
        self._tasks: dict[Phase, TaskID] = {}
        self.progress.start()

    def begun(self, phase: Phase) -> None:
        self._tasks[phase] = self.progress.add_task(
            phase.name, total=phase.total, target=phase.target, phase=phase, ok=True
        )

    def moved(self, phase: Phase) -> None:
        # The total is an estimate: what is under way must not look done.
        done = min(phase.done or 0, phase.total * 99 // 100) if phase.total else phase.done
        self.progress.update(self._tasks[phase], completed=done)

    def ended(self, phase: Phase, *, ok: bool) -> None:
        full = phase.total or phase.done or 1
        done = full if ok else 0
        self.progress.update(self._tasks[phase], total=full, completed=done, ok=ok)
        self.progress.refresh()

    def say(self, text: str) -> None:
        self.progress.console.print(text)

    def close(self) -> None:
        self.progress.stop()


class _Bar(BarColumn):
    """No bar, for a phase that has ended badly."""

    def render(self, task: Task) -> Text | object:  # type: ignore[override]
        return super().render(task) if task.fields["ok"] else Text("failed", style="red")


class _Amount(ProgressColumn):
    """Seconds, bytes and GB/s."""

    def render(self, task: Task) -> Text:
        phase: Phase = task.fields["phase"]
        if not task.finished and task.fields["ok"]:
            phase.seconds = time.monotonic() - phase.began
        return Text(f"{output.seconds(phase.seconds):>9}{_amount(phase)}", style="cyan")


def failed(display: Display, why: str) -> None:
    """Ends the display, and says that it was for nothing."""
    display.close()
    if isinstance(display, Json):
        display.finished(event="failed", error=why)
    click.echo(f"gritctl: {why}", err=True)


def choose(as_json: bool) -> Display:
    """Bars where somebody watches standard error, else lines."""
    if as_json:
        return Json()
    return Bars() if sys.stderr.isatty() else Lines()


def _amount(phase: Phase) -> str:
    if not phase.done:
        return ""
    rate = phase.done / phase.seconds / 1e9 if phase.seconds else 0.0
    return f"  {output.size(phase.done)}  {rate:.2f} GB/s"
