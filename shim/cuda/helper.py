"""The helper process: makes driver calls for the shim, each on a thread of its own.

A driver call about a process that cannot answer never returns. Here that costs one thread of a
process that can be killed; in the shim it would cost the pod. Talks over a SEQPACKET socket, one
message a packet, fields separated by tabs, times in seconds of CLOCK_MONOTONIC:

    helper: ready <libcuda> <CUDA version> <missing calls, comma-separated>
            or: none <why there is no libcuda>   or: broken <what is wrong with the helper>
    shim:   <id> <action> <pid> <argument>
    helper: <id> <CUresult> <its name, or why, or what it found> <value> <started> <ended>

Leaves at once when the shim closes the socket, whatever is under way. Never started by hand.
"""

from __future__ import annotations

import os
import socket
import threading
import time

from shim.cuda import privileges, states
from shim.cuda.errors import LibraryError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from shim.cuda.libcuda import LibCuda
    from shim.cuda.nvidia_command import NvidiaCommand

LARGEST_MESSAGE = 65536


def main(library: str, nvidia_command: str) -> None:
    """Serves the socket on fd 3 until it is closed."""
    peer = socket.socket(fileno=3)
    privileges.drop()
    try:
        from shim.cuda.libcuda import LibCuda
        from shim.cuda.nvidia_command import NvidiaCommand

        cuda = LibCuda(library)
    except LibraryError as error:
        peer.send(_line("none", error))
        return
    except Exception as error:  # cffi is not installed, say: nobody reads our stderr
        peer.send(_line("broken", error))
        return
    use_command = bool(cuda.missing and nvidia_command)
    backend = NvidiaCommand(nvidia_command) if use_command else cuda
    peer.send(_line("ready", cuda.path, cuda.cuda_version, ",".join(cuda.missing)))

    while request := peer.recv(LARGEST_MESSAGE):
        threading.Thread(target=_answer, args=(peer, cuda, backend, request), daemon=True).start()
    os._exit(0)  # not sys.exit: a thread that hangs in the driver must not keep us


def _answer(
    peer: socket.socket, cuda: LibCuda, backend: LibCuda | NvidiaCommand, request: bytes
) -> None:
    number, action, pid, argument = request.decode().split("\t")
    started = time.monotonic()
    try:
        if action == "survey":
            code, value, name = states.SUCCESS, 0, _survey(argument, cuda)
        elif action == "shed":
            _shed(int(pid), argument)
            code, value, name = states.SUCCESS, 0, ""
        elif action.startswith("lane_"):
            code, value, name = states.SUCCESS, 0, _move(action, int(pid), argument)
        elif action == "checkpoint" and argument:
            code, value, name = _prefaulted_copy(backend, cuda, int(pid), argument)
        else:
            code, value = _perform(backend, action, int(pid), argument)
            name = cuda.error_name(code)
    except Exception as error:  # a call must be answered, or the shim waits for its deadline
        code, value, name = states.UNKNOWN, 0, f"{error}"
    ended = time.monotonic()
    try:
        peer.send(_line(number, code, name, value, started, ended))
    except OSError:
        os._exit(0)  # the shim is gone


def _prefaulted_copy(
    backend: LibCuda | NvidiaCommand, cuda: LibCuda, pid: int, argument: str
) -> tuple[int, int, str]:
    """Its name is, where the copy was made, why it was made without that; "" if it was not."""
    from shim.cuda.prefault import prefaulted

    with prefaulted(pid, *map(int, argument.split(","))) as failures:
        code, value = backend.checkpoint(pid)
    return code, value, cuda.error_name(code) if code else "; ".join(failures)


def _survey(pids: str, cuda: LibCuda) -> str:
    from shim.cuda import nvml

    wanted = None if pids == "all" else set(map(int, filter(None, pids.split(","))))
    return nvml.survey(wanted, cuda.path).encode()


def _shed(pid: int, what: str) -> None:
    from shim.cuda.forked import Inheritance
    from shim.cuda.shed import shed

    shed(pid, Inheritance.decode(what))


def _move(action: str, pid: int, argument: str) -> str:
    """Arguments and what comes back are JSON: the shards, if files were written; what `choose`
    found."""
    import json

    from shim.cuda import lane
    from shim.cuda.shards import Shard

    given = json.loads(argument)
    if "shards" in given:
        given["shards"] = [Shard(*plain) for plain in given["shards"]]
    match action:
        case "lane_write":
            made = lane.write(pid, **given)
            return json.dumps([shard.whole() for shard in made], separators=(",", ":"))
        case "lane_check":
            lane.check(pid, **given)
        case "lane_choose":
            from shim.cuda import choice

            return json.dumps(choice.choose(pid, **given))
        case "lane_fill":
            lane.fill(pid, **given)
        case "lane_drop":
            lane.drop(**given)
        case _:
            raise LibraryError(f"no such action: {action!r}")
    return ""


def _perform(
    backend: LibCuda | NvidiaCommand, action: str, pid: int, argument: str
) -> tuple[int, int]:
    match action:
        case "state":
            return backend.state(pid)
        case "restore_tid":
            return backend.restore_tid(pid)
        case "lock":
            return backend.lock(pid, int(argument))
        case "checkpoint":
            return backend.checkpoint(pid)
        case "restore":
            return backend.restore(pid, argument)
        case "unlock":
            return backend.unlock(pid)
        case _:
            raise LibraryError(f"no such action: {action!r}")


def _line(*fields: object) -> bytes:
    return "\t".join(" ".join(str(field).split()) for field in fields).encode()
