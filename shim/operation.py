"""One intercepted call as the log, the node's counters and a trace have it: what it was, how it
ended, how long its phases took. Called with the container's lock held.
"""

from __future__ import annotations

import time

from shim import log

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import TypeVar

    from shim.container import Container

    T = TypeVar("T")

TRACE = ("traceparent", "tracestate", "baggage")
"""What containerd puts into a call's metadata when tracing is on (W3C Trace Context, Baggage)."""


def run(container: Container, name: str, metadata: Mapping[str, str], work: Callable[[], T]) -> T:
    """Does the work. What it asks of the inner shim belongs to the caller's trace."""
    container.trace = {key: metadata[key] for key in TRACE if key in metadata}
    container.phases.clear()
    container.sizes.clear()
    began = time.monotonic()
    result = "failed"
    try:
        answer = work()
        result = "ok"
        return answer
    finally:
        _ended(container, name, result, time.monotonic() - began)
        container.trace = {}


def _ended(container: Container, name: str, result: str, seconds: float) -> None:
    fields: dict[str, object] = {phase: round(took, 3) for phase, took in container.phases.items()}
    if container.trace.get("traceparent"):
        fields["trace"] = container.trace["traceparent"]
    write = log.info if result == "ok" else log.warning
    write(
        f"{name} {'done' if result == 'ok' else result}",
        id=container.id,
        operation=name,
        seconds=round(seconds, 3),
        **fields,
    )
    directory = container.config.metrics
    if directory:
        from shim import metrics

        metrics.record(
            directory, name, result, seconds, dict(container.phases), dict(container.sizes)
        )
