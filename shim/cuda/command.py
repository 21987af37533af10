"""`cuda-checkpoint` on the driver API: the command that CRIU's CUDA plugin runs, and an operator.

Same options, output and exit status as NVIDIA's where CRIU looks (criu 4.1 and 4.2,
plugins/cuda): `-h` mentions --action, a tid or a state is the first word of the output, 0 is
success, and any failure of --get-restore-tid means "no CUDA here". With GRIT_CUDA_RECORD set
(see `record`) questions are answered from that file, never by the driver: the process may be
frozen. CRIU runs this several times per process, so libcuda is loaded only for a driver call.
"""

from __future__ import annotations

import os
import sys

from shim.cuda import discovery, record, states
from shim.cuda.errors import CudaError, LibraryError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from shim.cuda.libcuda import LibCuda
    from shim.cuda.nvidia_command import NvidiaCommand

USAGE = """\
Suspends and resumes the CUDA side of a process through the driver's checkpoint API (r570+).

  cuda-checkpoint --get-state --pid PID         running, locked, checkpointed or failed
  cuda-checkpoint --get-restore-tid --pid PID   the driver's own thread in the process
  cuda-checkpoint --action lock|checkpoint|restore|unlock --pid PID
  cuda-checkpoint --toggle --pid PID            running <-> checkpointed

  -p, --pid PID              the process
  -a, --action ACTION        one step
  -t, --timeout MS           for lock: give up after so many milliseconds (default: wait)
  -d, --device-map OLD=NEW   for restore: GPU UUIDs, comma-separated pairs (r580+)
  -h, --help
"""

# What an action makes of a process.
RESULT = {
    "lock": states.LOCKED,
    "checkpoint": states.CHECKPOINTED,
    "restore": states.LOCKED,
    "unlock": states.RUNNING,
}
TOGGLE = {states.RUNNING: ("lock", "checkpoint"), states.CHECKPOINTED: ("restore", "unlock")}


class UsageError(Exception):
    """The arguments make no sense."""


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    try:
        options = parse(sys.argv[1:] if arguments is None else arguments)
        if options["operation"] == "help":
            sys.stdout.write(USAGE)
            return 0
        path = os.environ.get(record.VARIABLE, "")
        perform = _from_record if path else _from_driver
        for line in perform(options, path):
            print(line)
        return 0
    except UsageError as error:
        print(f"cuda-checkpoint: {error}; see --help", file=sys.stderr)
    except (CudaError, OSError, ValueError) as error:
        print(f"cuda-checkpoint: {error}", file=sys.stderr)
    return 1


def parse(arguments: list[str]) -> dict[str, str]:
    """operation (state, restore_tid, toggle, help or an action), pid, timeout, device_map."""
    options = {"operation": "", "pid": "", "timeout": "0", "device_map": ""}
    left = iter(arguments)
    for argument in left:
        name, equals, value = argument.partition("=")
        match name:
            case "-h" | "--help":
                options["operation"] = "help"
                return options
            case "--get-state":
                _operation(options, "state")
            case "--get-restore-tid":
                _operation(options, "restore_tid")
            case "--toggle":
                _operation(options, "toggle")
            case "-a" | "--action":
                action = value if equals else next(left, "")
                if action not in RESULT:
                    raise UsageError(f"--action takes {', '.join(RESULT)}, not {action!r}")
                _operation(options, action)
            case "-p" | "--pid":
                options["pid"] = value if equals else next(left, "")
            case "-t" | "--timeout":
                options["timeout"] = value if equals else next(left, "")
            case "-d" | "--device-map":
                # the value itself holds '='
                options["device_map"] = value if equals else next(left, "")
            case _:
                raise UsageError(f"unknown argument {argument!r}")
    if not options["operation"]:
        raise UsageError("nothing to do")
    for name in ("pid", "timeout"):
        if not options[name].isdecimal():
            raise UsageError(f"--{name} takes a number, not {options[name]!r}")
    return options


def _operation(options: dict[str, str], operation: str) -> None:
    if options["operation"]:
        raise UsageError("one operation at a time")
    options["operation"] = operation


def _from_record(options: dict[str, str], path: str) -> list[str]:
    """Within a dump by the plugin engine: what the shim knows is not asked again."""
    pid, operation = int(options["pid"]), options["operation"]
    known = record.read(path)
    entry = record.find(known, pid)
    if entry is None:
        raise CudaError(f"pid {pid}: no CUDA (by the record of the suspension, {path})")
    if operation == "restore_tid":
        return [str(entry["restore_tid"])]
    if operation == "state":
        return [entry["state"]]
    if operation == "toggle":
        raise UsageError("--toggle is not for use within a dump")
    _alarm(known["timeout"])
    backend = _backend(known["library"], known["nvidia_command"])
    _act(backend, operation, options)
    record.update(path, pid, RESULT[operation])
    return []


def _from_driver(options: dict[str, str], _: str) -> list[str]:
    pid, operation = int(options["pid"]), options["operation"]
    why = discovery.standstill(pid)
    if why:
        raise CudaError(f"pid {pid} cannot answer the driver: it is {why}")
    backend = _backend("", "")
    if operation == "restore_tid":
        return [str(_answered(backend, operation, pid, backend.restore_tid(pid)))]
    if operation in RESULT:
        _act(backend, operation, options)
        return []
    state = states.word(_answered(backend, "get state", pid, backend.state(pid)))
    if operation == "state":
        return [state]
    if state not in TOGGLE:
        raise CudaError(f"pid {pid} is {state}: --toggle takes it from running or checkpointed")
    for action in TOGGLE[state]:
        _act(backend, action, options)
    return []


def _backend(library: str, nvidia_command: str) -> LibCuda | NvidiaCommand:
    from shim.cuda.libcuda import LibCuda, missing_text

    cuda = LibCuda(library)
    if not cuda.missing:
        return cuda
    if nvidia_command:
        from shim.cuda.nvidia_command import NvidiaCommand

        return NvidiaCommand(nvidia_command)
    raise LibraryError(missing_text(cuda.path, cuda.cuda_version, cuda.missing))


def _act(backend: LibCuda | NvidiaCommand, action: str, options: dict[str, str]) -> None:
    pid = int(options["pid"])
    if action == "lock":
        result = backend.lock(pid, int(options["timeout"]))
    elif action == "restore":
        result = backend.restore(pid, options["device_map"])
    else:
        result = getattr(backend, action)(pid)
    _answered(backend, action, pid, result)


def _answered(backend: Any, what: str, pid: int, result: tuple[int, int]) -> int:
    code, value = result
    if code == states.SUCCESS:
        return value
    raise CudaError(f"pid {pid}: {what}: {states.error_name(code)} ({code})")


def _alarm(seconds: float) -> None:
    """The driver may never answer and CRIU would wait with us: let the kernel end this process."""
    import signal

    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1.0))


if __name__ == "__main__":
    sys.exit(main())
