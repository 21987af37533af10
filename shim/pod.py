"""The containers of one shim, and how those of a pod are paused as one.

A client checkpoints containers one by one: Pause, Checkpoint, Resume, then the next. In a pod
annotated `grit.dev/together=true` the first Pause is a Pause of all its containers: all GPUs are
suspended, then all are frozen, and all stay so until each was checkpointed and resumed by its
client, so that what they share agrees in all the images. To a client, a container that it has
not paused itself shows as running meanwhile; its own Pause then finds it paused already.

A pod whose client loses interest is resumed after `together_timeout`.
"""

from __future__ import annotations

import threading

from shim import bundle, cri, journal, log, messages, operation

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from contextlib import ExitStack
    from typing import Any

    from shim.container import Container
    from shim.loopback import Ends

ANNOTATION = "grit.dev/together"

_ROUNDS = 3
"""How often processes that take up CUDA meanwhile make the pod's pause begin again."""


class PodError(Exception):
    """A pod was not paused, or not resumed, as a whole; says what its containers are in."""


class _Again(Exception):
    """A container would have to be frozen later than the others."""


class _Pause:
    """One pause of a whole pod. `members` are the containers that live, `claimed` those that a
    client has paused and not resumed yet, `dumped` those checkpointed since, `settled` those
    resumed after that."""

    def __init__(self, members: list[Container]) -> None:
        self.members = {one.id: one for one in members}
        self.claimed: set[str] = set()
        self.dumped: set[str] = set()
        self.settled: set[str] = set()
        self.timer: threading.Timer | None = None

    def claim(self, container_id: str) -> None:
        self.claimed.add(container_id)
        self.dumped.discard(container_id)
        self.settled.discard(container_id)
        self.disarm()

    def disarm(self) -> None:
        if self.timer:
            self.timer.cancel()
            self.timer = None


def together(spec: dict[str, Any]) -> bool:
    """Whether a container is to be paused with the others of its pod. Raises ValueError."""
    notes = bundle.annotations_of(spec)
    value = notes.get(ANNOTATION, "false")
    if value not in ("true", "false"):
        raise ValueError(f'the annotation {ANNOTATION} is "{value}"; it must be "true" or "false"')
    return value == "true" and not cri.is_sandbox(notes)


class Pod:
    """The containers by id, and the Pause, Checkpoint and Resume of one or of all."""

    def __init__(self) -> None:
        self.containers: dict[str, Container] = {}
        self.filled_volumes: set[str] = set()
        """The pod's volumes, by their directories, that a restore has put back."""
        self.ends: Ends | None = None
        """Of connections between its containers, once one with kept connections is restored."""
        self._turn = threading.Lock()  # held while a pause of all begins or ends
        self._pause: _Pause | None = None

    @property
    def paused_together(self) -> bool:
        return self._pause is not None

    def shows_running(self, container_id: str) -> bool:
        """Whether the container is frozen for the others' sake only, which no client asked for."""
        pause = self._pause
        return (
            pause is not None
            and container_id in pause.members
            and container_id not in pause.claimed
        )

    def pause(self, one: Container, connection: int, metadata: Mapping[str, str]) -> None:
        """Raises what `checkpoint.pause` raises, or PodError, with every container running."""
        from shim import checkpoint

        with self._turn:
            pause = self._pause
            if pause is None and one.together and one.status() == messages.RUNNING:
                pause = self._pause_all(one, metadata)
            elif pause is None or one.id not in pause.members or one.id in pause.claimed:
                with one.lock:
                    operation.run(
                        one, "suspend", metadata, lambda: checkpoint.pause(one, connection)
                    )
                return
            pause.claim(one.id)
            one.paused_by, one.orphanable = connection, False

    def checkpoint(
        self,
        one: Container,
        request: messages.CheckpointTaskRequest,
        connection: int,
        metadata: Mapping[str, str],
    ) -> None:
        """Raises what `checkpoint.checkpoint` raises."""
        from shim import checkpoint, options

        alone = one.together and one.status() == messages.RUNNING  # no known client does so
        if alone:
            self.pause(one, connection, metadata)
        try:
            with one.lock:
                operation.run(
                    one,
                    "checkpoint",
                    metadata,
                    lambda: checkpoint.checkpoint(one, request, connection),
                )
            if self._pause:
                self._pause.dumped.add(one.id)
        finally:
            if alone:
                self.resume(one, metadata)
        if options.checkpoint_options(request.options).exit:
            self.forget(one)

    def resume(self, one: Container, metadata: Mapping[str, str]) -> None:
        """Raises what `checkpoint.resume` raises, or PodError."""
        from shim import checkpoint

        with self._turn:
            pause = self._pause
            if pause is None or one.id not in pause.members:
                with one.lock:
                    operation.run(one, "resume", metadata, lambda: checkpoint.resume(one))
                return
            one.paused_by, one.orphanable = None, False
            pause.claimed.discard(one.id)
            if one.id in pause.dumped:
                pause.settled.add(one.id)
                self._go_on(pause)
            else:
                self._release(pause)  # nobody wanted a checkpoint, or it failed

    def abandon(self, one: Container, why: str, still: Callable[[], bool] = lambda: True) -> None:
        """Resumes what a client that has gone had paused, if that is `still` wanted when its turn
        has come. `why` goes to the log."""
        from shim import checkpoint

        with self._turn:
            pause = self._pause
            if pause is not None and one.id in pause.members:
                if one.paused_by is not None and still():
                    self._release_logged(pause, f"container {one.id}: {why}")
                return
        checkpoint.abandon(one, why, still)

    def forget(self, one: Container) -> None:
        """The container has ended: nobody waits for it any more."""
        with self._turn:
            pause = self._pause
            if pause is not None and one.id in pause.members:
                pause.claimed.discard(one.id)
                del pause.members[one.id]
                try:
                    self._go_on(pause)
                except PodError as error:
                    log.error("a pod could not be resumed", ended=one.id, error=error)

    def _pause_all(self, one: Container, metadata: Mapping[str, str]) -> _Pause:
        members = [
            other
            for other in self.containers.values()
            if other is one or (other.together and other.status() == messages.RUNNING)
        ]
        with _locked(members):
            return operation.run(one, "suspend", metadata, lambda: self._pause_members(members))

    def _pause_members(self, members: list[Container]) -> _Pause:
        for _ in range(_ROUNDS):
            failures = _suspend_then_freeze(members)
            if not failures:
                self._pause = _Pause(members)
                return self._pause
            done = [member for member in members if member.id not in failures]
            left = _resume_all(done)
            if left or not all(isinstance(e, _Again) for e in failures.values()):
                break
        told = [str(error) for error in failures.values() if not isinstance(error, _Dropped)]
        raise PodError("; ".join([*told, *left.values(), _left_running(left)]))

    def _go_on(self, pause: _Pause) -> None:
        """Lets all go if none is waited for, else waits, but not for ever."""
        waiting = [one for name, one in pause.members.items() if name not in pause.settled]
        if not waiting:
            self._release(pause)
        elif not pause.claimed:
            limit = waiting[0].config.together_timeout
            pause.disarm()
            pause.timer = threading.Timer(limit, self._expire, (pause,))
            pause.timer.daemon = True
            pause.timer.start()
            log.info(
                "paused until the pod's other containers are checkpointed",
                waiting=",".join(one.id for one in waiting),
                seconds=limit,
            )

    def _expire(self, pause: _Pause) -> None:
        with self._turn:
            if self._pause is pause and not pause.claimed:
                self._release_logged(pause, "nobody checkpoints the pod's other containers")

    def _release(self, pause: _Pause) -> None:
        pause.disarm()
        members = list(pause.members.values())
        with _locked(members):
            self._pause = None
            left = _resume_all(members)
        if left:
            raise PodError("; ".join(left.values()))

    def _release_logged(self, pause: _Pause, why: str) -> None:
        ids = ",".join(pause.members)
        try:
            self._release(pause)
        except Exception as error:
            log.error(f"{why}; the pod could not be resumed", ids=ids, error=error)
        else:
            log.warning(f"{why}; the pod runs on", ids=ids)


class _Dropped(Exception):
    """Not frozen since another container of the pod could not be."""


def _suspend_then_freeze(members: list[Container]) -> dict[str, Exception]:
    """Pauses all, none frozen before each has given its GPU away; what went wrong, by container,
    with those named in it running."""
    from shim import checkpoint

    barrier = threading.Barrier(len(members))
    failures: dict[str, Exception] = {}

    def pause(one: Container) -> None:
        met = False

        def meet() -> None:
            nonlocal met
            if met:
                raise _Again(f"container {one.id}: a process took up CUDA during the suspension")
            met = True
            try:
                barrier.wait()
            except threading.BrokenBarrierError:
                raise _Dropped from None

        alone, one.meet = one.meet, meet
        try:
            checkpoint.suspend_and_freeze_ahead(one)
        except Exception as error:
            failures[one.id] = error
            journal.close(one)
            barrier.abort()
        finally:
            one.meet = alone

    _in_parallel(pause, members)
    return failures


def _resume_all(members: list[Container]) -> dict[str, str]:
    """Thaws all and gives each its GPU back; what could not be done, by container."""
    from shim import checkpoint

    failures: dict[str, str] = {}

    def resume(one: Container) -> None:
        try:
            if one.status() == messages.STOPPED:
                one.forget_pause()
            else:
                checkpoint.resume(one)
        except Exception as error:
            failures[one.id] = f"container {one.id} could not be resumed: {error}"

    _in_parallel(resume, members)
    return failures


def _left_running(left: dict[str, str]) -> str:
    return "the pod's other containers run on" if left else "all containers of the pod run on"


def _in_parallel(work: Callable[[Container], None], members: list[Container]) -> None:
    threads = [threading.Thread(target=work, args=(one,), daemon=True) for one in members]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _locked(members: list[Container]) -> ExitStack:
    """The locks of all, taken in one order whoever takes them."""
    from contextlib import ExitStack

    stack = ExitStack()
    for one in sorted(members, key=lambda member: member.id):
        stack.enter_context(one.lock)
    return stack
