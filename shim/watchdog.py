"""Resumes a container that stands paused while its client says nothing for `pause_timeout`
seconds: one that was killed, say, which nobody tells the shim as long as containerd lives on.

Off unless it is asked for. A Pause that is meant to last for days looks the same from here.
"""

from __future__ import annotations

import threading

TYPE_CHECKING = False
if TYPE_CHECKING:
    from shim.container import Container
    from shim.pod import Pod


def stop(container: Container) -> None:
    """The client has come back; to be called before the container's lock is waited for."""
    if container.watch:
        container.watch.cancel()
        container.watch = None


def start(container: Container, pod: Pod) -> None:
    """To be called when a Pause, Checkpoint or Resume has ended, however it did."""
    stop(container)
    limit = container.config.pause_timeout
    if not limit or container.paused_by is None:
        return

    def expired() -> None:
        why = f"paused, and {limit:g} s without a Checkpoint or Resume (pause_timeout)"
        pod.abandon(container, why, lambda: container.watch is timer)
        if container.watch is timer:
            start(container, pod)  # where it could not be resumed: once more, later

    timer = threading.Timer(limit, expired)
    timer.daemon = True
    container.watch = timer
    timer.start()
