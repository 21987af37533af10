"""The calls this shim steps into, out of all that pass through it.

Create, Start and Delete keep the list of containers, Pause, Checkpoint and Resume do what the
shim is for. Each runs on a thread of its own (the proxy sees to that) and may take as long as
it takes; State, Pids, Kill, Connect and the rest never come here.
"""

from __future__ import annotations

import os

from shim import (
    bundle,
    config,
    container,
    group,
    journal,
    log,
    messages,
    operation,
    options,
    places,
    pod,
    watchdog,
)
from shim.ttrpc import FORWARD, INVALID_ARGUMENT, UNKNOWN, StatusError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from shim.ttrpc import Call, Client, Forward
    from shim.ttrpc.handlers import Handler


_CLIENT_GONE = "the client of a checkpoint has gone"


class Tasks:
    """The group's containers and the handlers of the intercepted calls.

    `inner` is a connection to the stock shim that no client owns: what is asked through it goes
    on when containerd's own connection drops. `home` is the group's run directory.
    """

    def __init__(self, inner: Client, namespace: str, home: str) -> None:
        self._inner = inner
        self._namespace = namespace
        self._home = home
        self._pod = pod.Pod()
        self._containers = self._pod.containers
        self._gone: set[int] = set()  # connections that have ended; a number is never used again
        self._handlers: dict[str, Handler] = {
            "Create": self._create,
            "Start": self._start,
            "Pause": self._pause,
            "Checkpoint": self._checkpoint,
            "Resume": self._resume,
            "Delete": self._delete,
        }

    def handler_for(self, service: str, method: str) -> Handler | None:
        if service not in messages.SERVICES:
            return None
        if method == "State" and self._pod.paused_together:
            return self._state
        handler = self._handlers.get(method)
        return (lambda call: _told(call, handler)) if handler else None

    def connection_closed(self, connection: int) -> None:
        """A client's connection has gone, with containerd or without: a Checkpoint of its that
        is under way ends well or is undone, and nobody is left to send the Resume."""
        self._gone.add(connection)
        for one in list(self._containers.values()):
            if one.paused_by == connection and one.orphanable:
                self._pod.abandon(one, _CLIENT_GONE)

    def settle(self) -> None:
        """Called when serving ends: waits for calls under way, since ending in the middle of a
        dump would leave a container frozen."""
        for one in list(self._containers.values()):
            with one.lock:
                pass

    def _create(self, call: Call) -> bytes:
        request = messages.CreateTaskRequest.decode(call.payload)
        try:
            spec = bundle.read_spec(request.bundle)
            together = pod.together(spec)
            request.options, ours = options.read(request.options)
            runc = options.runc_options(request.options)
        except (config.ConfigError, ValueError) as error:
            raise StatusError(INVALID_ARGUMENT, f"container {request.id}: {error}") from error
        one = container.Container(self._inner, call.service, self._namespace, request, runc, ours)
        one.together, one.home = together, self._home
        restored = request.checkpoint or bundle.annotations_of(spec).get(bundle.RESTORE_ANNOTATION)
        if os.path.isdir(places.INTENTS):
            from shim import intents

            if restored:
                one.meant = intents.annotated(spec)
            else:
                restored = one.meant = intents.ask(one, spec)
        try:
            return _for_agent(one, lambda: self._create_one(one, call, request, bool(restored)))
        except BaseException:
            _drop_plain(one)
            raise

    def _create_one(
        self,
        one: container.Container,
        call: Call,
        request: messages.CreateTaskRequest,
        restored: bool,
    ) -> bytes:
        if restored:
            from shim import restore

            one.restore = restore.prepare(one, request)
        reply = self._relay(call, request.encode())
        if one.restore:
            try:
                restore.fill(one, self._pod.filled_volumes)
            except BaseException:
                one.ask("Delete", messages.ExecRequest(id=one.id))
                raise
        self._containers[one.id] = one
        group.add_task(self._home, one.id, one.bundle)
        return reply

    def _start(self, call: Call) -> bytes | Forward:
        request = messages.ExecRequest.decode(call.payload)
        one = self._containers.get(request.id)
        if one is None or request.exec_id or one.restore is None:
            return FORWARD
        from shim import restore

        def start() -> bytes:
            return operation.run(
                one, "restore", call.metadata, lambda: restore.start(one, self._pod)
            )

        with one.lock:
            try:
                reply = _for_agent(one, start)
            finally:
                _drop_plain(one)
                journal.close(one)
        if one.meant:
            from shim import intents

            intents.tell(one, "")
        return reply

    def _pause(self, call: Call) -> bytes | Forward:
        one = self._containers.get(messages.TaskRequest.decode(call.payload).id)
        if one is None:
            return FORWARD
        try:
            self._pod.pause(one, call.connection, call.metadata)
        finally:
            watchdog.start(one, self._pod)
        self._check_caller(one, call)
        return b""

    def _checkpoint(self, call: Call) -> bytes | Forward:
        request = messages.CheckpointTaskRequest.decode(call.payload)
        one = self._containers.get(request.id)
        if one is None:
            return FORWARD
        watchdog.stop(one)
        try:
            self._pod.checkpoint(one, request, call.connection, call.metadata)
        finally:
            watchdog.start(one, self._pod)
            self._check_caller(one, call)
        return b""

    def _check_caller(self, one: container.Container, call: Call) -> None:
        """A caller whose connection ended before it could be answered has not got what it asked
        for, and will not send the Resume that belongs to it."""
        if call.connection in self._gone and one.paused_by == call.connection:
            self._pod.abandon(one, _CLIENT_GONE)

    def _resume(self, call: Call) -> bytes | Forward:
        one = self._containers.get(messages.TaskRequest.decode(call.payload).id)
        if one is None:
            return FORWARD
        one.give_up_dump()  # a client that resumes in the middle of its dump does not want it
        watchdog.stop(one)
        try:
            self._pod.resume(one, call.metadata)
        finally:
            watchdog.start(one, self._pod)
        return b""

    def _state(self, call: Call) -> bytes:
        """The inner shim's answer, but for a container that is frozen for its pod's sake: a client
        that found it paused would leave the Pause, and the Resume, to somebody else."""
        reply = messages.StateResponse.decode(self._relay(call, call.payload))
        if reply.status == messages.PAUSED and self._pod.shows_running(reply.id):
            reply.status = messages.RUNNING
        return reply.encode()

    def _delete(self, call: Call) -> bytes | Forward:
        request = messages.ExecRequest.decode(call.payload)
        if request.exec_id or request.id not in self._containers:
            return FORWARD
        reply = self._relay(call, call.payload)
        one = self._containers.pop(request.id, None)
        if one is not None:
            self._pod.forget(one)
            watchdog.stop(one)
            _drop_plain(one)  # it was never started
            one.close_held()
            journal.close(one)
            for draft in (one.kept, one.ahead):
                if draft:
                    draft.discard()  # nobody is left to fill in what it has, or to have it
        group.remove_task(self._home, request.id)
        return reply

    def _relay(self, call: Call, payload: bytes) -> bytes:
        """The inner shim's answer to a call that the client's connection need not outlive."""
        return self._inner.call(
            call.service, call.method, payload, timeout=call.timeout, metadata=call.metadata
        )


def _drop_plain(one: container.Container) -> None:
    """Removes what was decrypted for its restore, if anything was."""
    if one.plain is None:
        return
    from shim.checkpoint_dir import CheckpointDirError

    try:
        one.plain.discard()
    except CheckpointDirError as error:
        log.error("images were left in the clear", id=one.id, error=error)
    one.plain = None
    journal.close(one)


def _for_agent(one: container.Container, work: Callable[[], bytes]) -> bytes:
    """Does the work; if that fails, the node's agent hears it too, where it means a Restore."""
    try:
        return work()
    except Exception as error:
        if one.meant:
            from shim import intents

            intents.tell(one, error.message if isinstance(error, StatusError) else str(error))
        raise


def _told(call: Call, handler: Handler) -> bytes | Forward:
    """Runs a handler. What went wrong here is logged as well as told to the client, since clients
    drop many an error unread (a deferred Resume's above all); what the inner shim refused is
    only passed on."""
    try:
        return handler(call)
    except StatusError:
        raise
    except Exception as error:
        log.error(f"{call.method} failed", error=error, kind=type(error).__name__)
        raise StatusError(UNKNOWN, str(error) or repr(error)) from error
