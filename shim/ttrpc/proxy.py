"""A proxy that hands frames through as they come and answers a few calls itself.

One thread runs one epoll loop. Every outer connection has a twin, an inner connection of its own,
so stream ids stay as they are and nobody needs a table of them. Only request frames are looked
into; those whose method has a handler are answered by it on a thread of its own, so that a call
that takes minutes holds up nothing. The loop itself must never wait for a peer, never run a
handler, and never end because of what a peer or a handler does.

What a handler returns as FORWARD goes on to the twin, if no higher id has gone there meanwhile: a
Go server refuses ids that do not grow. Otherwise it goes over an inner connection made for that
one call, on which any id is the first, and its answer comes back under the id it always had.
"""

from __future__ import annotations

import _socket
import os
import select
import sys
import threading
from collections import deque
from time import monotonic

from shim.protowire import DecodeError
from shim.ttrpc.connection import StreamIds, bad_request, failure, response
from shim.ttrpc.frames import REQUEST, Frame, FrameReader, Oversize
from shim.ttrpc.handlers import Call, Forward, as_status
from shim.ttrpc.messages import Request, Route, metadata_dict, seconds
from shim.ttrpc.sockets import accept, is_same_user
from shim.ttrpc.status import RESOURCE_EXHAUSTED, UNAVAILABLE, UNKNOWN, StatusError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from shim.ttrpc.handlers import Handler

_READ = 1 << 16
_MAX_WAITING = 1 << 20  # bytes not yet taken by a peer, above which its sources are not read
_MAX_CALLS = 256  # handlers of one connection at a time
_ACCEPT_PAUSE = 0.1  # seconds without accepting after accept() failed, e.g. for lack of descriptors
_GRACE = 1.0  # seconds that stop() leaves to replies under way

_IN, _OUT = select.EPOLLIN, select.EPOLLOUT


class _End:
    """One socket of the loop, with what its peer has not yet taken."""

    __slots__ = ("broken", "mask", "out", "reader", "receive", "session", "sock", "waiting")

    def __init__(
        self, sock: _socket.socket, session: _Session, receive: Callable[[_End, bytes], None]
    ) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.session = session
        self.receive = receive  # called with what was read, b"" for the end
        self.reader = FrameReader()
        self.out: deque[bytes | memoryview] = deque()
        self.waiting = 0
        self.mask = 0
        self.broken = False  # the peer takes no more


class _Session:
    """An outer connection, its twin, and what is under way between them."""

    __slots__ = ("calls", "draining", "ids", "late", "number", "outer", "passed", "twin")

    outer: _End
    twin: _End

    def __init__(self, number: int) -> None:
        self.number = number
        self.ids = StreamIds()
        self.passed = 0  # highest id of a request that went to the twin
        self.calls: dict[int, Frame] = {}  # with handlers now
        self.late: dict[_End, int] = {}  # inner connections made for one call, and its stream id
        self.draining = False  # the twin is gone, the outer has yet to take what it said

    def ends(self) -> list[_End]:
        return [self.outer, self.twin, *self.late]


class Proxy:
    """Serves peers of our own user on `listener`, which it owns, with what `dial` connects to.

    `dial` gives a socket connected to the inner server and must not wait long. `handler_for` says
    for a service and method who answers instead, None for nobody; it runs on the loop and must be
    quick. A handler gets a Call and returns the answer's payload or FORWARD, or raises. `on_close`
    is called on a thread of its own with the connection's number when an outer connection has gone.
    """

    def __init__(
        self,
        listener: _socket.socket,
        dial: Callable[[], _socket.socket],
        handler_for: Callable[[str, str], Handler | None],
        on_close: Callable[[int], None] | None = None,
    ) -> None:
        self._listener = listener
        self._dial = dial
        self._handler_for = handler_for
        self._on_close = on_close
        self._epoll = select.epoll()
        self._wakeup = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._wakeup_open = True
        # Reentrant, since stop() may be called by a signal handler on the loop's own thread.
        self._wakeup_lock = threading.RLock()
        self._sessions: dict[int, _Session] = {}
        self._last_number = 0
        self._ends: dict[int, _End] = {}
        self._finished: deque[tuple[int, int, bytes | Forward]] = deque()
        self._accept_again: float | None = None
        self._stopping = False
        self._deadline: float | None = None

    def run(self) -> None:
        """Proxies until `stop`."""
        self._listener.setblocking(False)
        self._epoll.register(self._listener, _IN)
        self._epoll.register(self._wakeup, _IN)
        listening, wakeup = self._listener.fileno(), self._wakeup
        ends, poll = self._ends, self._epoll.poll
        try:
            while not self._is_done():
                for fd, mask in poll(self._until_due()):
                    end = ends.get(fd)
                    if end is not None:
                        try:
                            self._serve(end, mask)
                        except Exception as error:
                            self._spoil(end.session, error)
                    elif fd == listening:
                        self._accept()
                    elif fd == wakeup:
                        os.eventfd_read(wakeup)
                        self._finish_calls()
        finally:
            self._close_all()

    def stop(self) -> None:
        """Ends `run` from any thread or signal handler.

        No more is accepted or read from outer connections. Handlers under way get a second to
        finish, then every connection is closed and its `on_close` called.
        """
        self._stopping = True
        self._wake()

    def _wake(self) -> None:
        with self._wakeup_lock:
            if self._wakeup_open:
                os.eventfd_write(self._wakeup, 1)

    # The loop

    def _until_due(self) -> float:
        """Seconds until something is due, -1 for nothing; resumes accepting if that is."""
        due = self._deadline or self._accept_again
        if due is None:
            return -1
        left = max(0.0, due - monotonic())
        if not left and self._deadline is None:
            self._accept_again = None
            self._epoll.register(self._listener, _IN)
        return left

    def _is_done(self) -> bool:
        if not self._stopping:
            return False
        if self._deadline is None:
            self._deadline = monotonic() + _GRACE
            self._stop_listening()
            for session in self._sessions.values():
                self._watch(session.outer)
        busy = any(session.calls or session.outer.out for session in self._sessions.values())
        return not busy or monotonic() >= self._deadline

    def _spoil(self, session: _Session, error: Exception) -> None:
        """After a mistake of ours: it costs one connection, not all of them."""
        sys.excepthook(type(error), error, error.__traceback__)
        self._close(session)

    def _serve(self, end: _End, mask: int) -> None:
        if mask & _OUT:
            self._flush(end)
        if mask & ~_OUT and end.mask & _IN:
            try:
                data = end.sock.recv(_READ)
            except BlockingIOError:
                return
            except OSError:  # reset: as good as the end
                data = b""
            end.receive(end, data)

    def _accept(self) -> None:
        try:
            sock = accept(self._listener)
        except BlockingIOError:
            return
        except OSError:
            self._stop_listening()
            self._accept_again = monotonic() + _ACCEPT_PAUSE
            return
        try:
            if not is_same_user(sock):
                sock.close()
                return
            inner = self._dial()
        except Exception as error:
            # Without an inner there is nothing to say; the peer sees the end, as of a dead shim.
            sys.excepthook(type(error), error, None)
            sock.close()
            return
        self._last_number += 1
        session = _Session(self._last_number)
        session.outer = _End(sock, session, self._from_outer)
        session.twin = _End(inner, session, self._from_twin)
        self._sessions[session.number] = session
        self._add(session.outer)
        self._add(session.twin)

    def _stop_listening(self) -> None:
        if self._accept_again is None:
            self._epoll.unregister(self._listener)

    # Frames from the three kinds of peers

    def _from_outer(self, end: _End, data: bytes) -> None:
        session = end.session
        if not data:
            self._close(session)
            return
        onward = []
        for item in end.reader.feed(data):
            if isinstance(item, Oversize):
                self._write(end, failure(item.stream_id, item.error))
            elif item.kind != REQUEST or self._is_for_twin(session, item):
                onward.append(item.raw)
        if onward:
            self._write(session.twin, onward[0] if len(onward) == 1 else b"".join(onward))

    def _from_twin(self, end: _End, data: bytes) -> None:
        session = end.session
        if data:
            self._relay(end, data)
        elif session.outer.out:
            session.draining = True
            self._remove(end)
            self._watch(session.outer)
        else:
            self._close(session)

    def _from_late(self, end: _End, data: bytes) -> None:
        session, stream_id = end.session, end.session.late[end]
        if not data:
            error = StatusError(UNAVAILABLE, "the inner server closed the connection of this call")
            self._write(session.outer, failure(stream_id, error))
            self._drop_late(end)
        elif self._relay(end, data):
            self._drop_late(end)

    def _relay(self, end: _End, data: bytes) -> bool:
        """Passes what an inner connection says to the outer one; whether that ended a stream."""
        onward, ended = [], False
        for item in end.reader.feed(data):
            if isinstance(item, Oversize):
                onward.append(failure(item.stream_id, item.error))
                ended = True
            else:
                onward.append(item.raw)
                ended = ended or item.ends_stream
        if onward:
            self._write(end.session.outer, onward[0] if len(onward) == 1 else b"".join(onward))
        return ended

    # Intercepted calls

    def _is_for_twin(self, session: _Session, frame: Frame) -> bool:
        """Whether a request goes on at once; else it has been answered or given to a handler."""
        try:
            return self._route(session, frame)
        except DecodeError as error:
            status = bad_request(error)
        except Exception as error:
            status = as_status(error)
        self._write(session.outer, failure(frame.stream_id, status))
        return False

    def _route(self, session: _Session, frame: Frame) -> bool:
        refusal = session.ids.refuse(frame.stream_id)
        if refusal is not None:
            raise refusal
        route = Route.decode(frame.data)
        handler = self._handler_for(route.service, route.method)
        if handler is not None:
            self._start_call(session, frame, handler)
            return False
        session.passed = frame.stream_id
        return True

    def _start_call(self, session: _Session, frame: Frame, handler: Handler) -> None:
        if len(session.calls) >= _MAX_CALLS:
            raise StatusError(RESOURCE_EXHAUSTED, f"more than {_MAX_CALLS} calls at once")
        request = Request.decode(frame.data)
        call = Call(
            request.service,
            request.method,
            request.payload,
            timeout=seconds(request.timeout_nano),
            metadata=metadata_dict(request.metadata),
            connection=session.number,
        )
        thread = threading.Thread(
            target=self._run_call,
            args=(frame.stream_id, call, handler),
            name=f"ttrpc {call.method}",
            daemon=True,
        )
        try:
            thread.start()
        except RuntimeError as error:
            raise StatusError(RESOURCE_EXHAUSTED, f"{call.method}: {error}") from None
        session.calls[frame.stream_id] = frame

    def _run_call(self, stream_id: int, call: Call, handler: Handler) -> None:
        """On the call's own thread: the handler's outcome as the frame that answers, or FORWARD."""
        try:
            result = handler(call)
            if isinstance(result, Forward):
                outcome: bytes | Forward = result
            elif isinstance(result, bytes):
                outcome = response(stream_id, result)
            else:
                text = f"the handler of {call.method} returned a {type(result).__name__}"
                outcome = failure(stream_id, StatusError(UNKNOWN, text))
        except BaseException as error:
            outcome = failure(stream_id, as_status(error))
        self._finished.append((call.connection, stream_id, outcome))
        self._wake()

    def _finish_calls(self) -> None:
        while self._finished:
            number, stream_id, outcome = self._finished.popleft()
            session = self._sessions.get(number)
            if session is None:  # the caller went away meanwhile
                continue
            try:
                self._finish_call(session, stream_id, outcome)
            except Exception as error:
                self._spoil(session, error)

    def _finish_call(self, session: _Session, stream_id: int, outcome: bytes | Forward) -> None:
        frame = session.calls.pop(stream_id)
        if isinstance(outcome, bytes):
            self._write(session.outer, outcome)
        elif stream_id > session.passed:
            session.passed = stream_id
            self._write(session.twin, frame.raw)
        else:
            self._forward_late(session, frame)

    def _forward_late(self, session: _Session, frame: Frame) -> None:
        try:
            sock = self._dial()
        except OSError as error:
            status = StatusError(UNAVAILABLE, f"no connection to the inner server: {error}")
            self._write(session.outer, failure(frame.stream_id, status))
            return
        end = _End(sock, session, self._from_late)
        session.late[end] = frame.stream_id
        self._add(end)
        self._write(end, frame.raw)

    # Writing, and how much is read meanwhile

    def _write(self, end: _End, data: bytes) -> None:
        if end.broken:
            return
        sent = 0
        if not end.out:
            try:
                sent = end.sock.send(data)
            except BlockingIOError:
                pass
            except OSError:
                self._break(end)
                return
            if sent == len(data):
                return
        end.out.append(memoryview(data)[sent:])
        end.waiting += len(data) - sent
        self._watch(end)
        if end.waiting > _MAX_WAITING:
            self._balance(end.session)

    def _flush(self, end: _End) -> None:
        while end.out:
            data = end.out[0]
            try:
                sent = end.sock.send(data)
            except BlockingIOError:
                break
            except OSError:
                self._break(end)
                break
            end.waiting -= sent
            if sent < len(data):
                end.out[0] = data[sent:]
            else:
                end.out.popleft()
        if end.session.draining and not end.out:
            self._close(end.session)
        else:
            self._balance(end.session)

    def _break(self, end: _End) -> None:
        """The peer takes no more; what it said before may still be there to read, then its end."""
        end.broken = True
        end.out.clear()
        end.waiting = 0
        self._watch(end)

    def _balance(self, session: _Session) -> None:
        for end in session.ends():
            self._watch(end)

    def _watch(self, end: _End) -> None:
        """Has epoll report what is now wanted of a socket.

        One of which nothing is wanted is taken out altogether: a hang-up is reported always and
        would keep the loop spinning.
        """
        fd = end.sock.fileno()
        if fd not in self._ends:
            return
        wanted = (_IN if self._may_read(end) else 0) | (_OUT if end.out else 0)
        if wanted == end.mask:
            return
        if not wanted:
            self._epoll.unregister(fd)
        elif not end.mask:
            self._epoll.register(fd, wanted)
        else:
            self._epoll.modify(fd, wanted)
        end.mask = wanted

    def _may_read(self, end: _End) -> bool:
        session = end.session
        if session.outer.waiting > _MAX_WAITING:
            return False
        if end is not session.outer:
            return True
        return not (self._stopping or session.draining or session.twin.waiting > _MAX_WAITING)

    # Coming and going

    def _add(self, end: _End) -> None:
        self._ends[end.sock.fileno()] = end
        self._watch(end)

    def _remove(self, end: _End) -> None:
        fd = end.sock.fileno()
        if self._ends.pop(fd, None) is not None:
            if end.mask:
                self._epoll.unregister(fd)
            end.sock.close()

    def _drop_late(self, end: _End) -> None:
        end.session.late.pop(end, None)
        self._remove(end)

    def _close(self, session: _Session) -> None:
        """Ends a connection on both sides; its inner sees that, and cancels what it was doing."""
        if self._sessions.pop(session.number, None) is None:
            return
        for end in session.ends():
            self._remove(end)
        if self._on_close is not None:
            try:
                threading.Thread(target=self._on_close, args=(session.number,), daemon=True).start()
            except RuntimeError as error:  # no more threads to be had
                sys.excepthook(type(error), error, error.__traceback__)

    def _close_all(self) -> None:
        for session in list(self._sessions.values()):
            self._close(session)
        self._listener.close()
        self._epoll.close()
        with self._wakeup_lock:
            self._wakeup_open = False
            os.close(self._wakeup)
