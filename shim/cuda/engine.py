"""Takes a container's GPU away and gives it back: all its CUDA processes at once, or none.

`suspend` before the freeze, `resume` after the thaw, `resume_restored` after a CRIU restore,
`missed` while frozen. What a step asks of the driver it verifies by the driver's own word; a
failure on the way is undone, and the error says what the driver says of each process afterwards.
Never asks the driver about a process that stands still, never retries behind the caller's back,
never waits without a deadline. Lean: runs in the shim.
"""

from __future__ import annotations

import os
import threading
import time

from shim.cuda import discovery, forked, limits, room, states
from shim.cuda.driver import Answer, Driver, Library
from shim.cuda.errors import CallAbandoned, CudaError, HelperDied, LibraryError
from shim.cuda.suspension import Process, Suspension, from_candidate

ANSWER_SECONDS = 10.0  # for a question about a process that runs (measured: 0.4 ms)
PATIENT_SECONDS = 60.0  # where a copy that was given up may still go on (17 GB took 9 s)
GRACE_SECONDS = 3.0  # what a driver call may take past the timeout it was given itself
GONE = "gone"  # the process exited, or runs another program by now
FIRST_PLUGIN_CRIU = (4, 1, 0)  # the first that takes a locked process in a frozen cgroup

TYPE_CHECKING = False  # the name type checkers know; the real one costs importing `typing`
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import TypeAlias, TypeVar

    Pids: TypeAlias = Callable[[], list[int]]  # host pids of the container, as of now
    BeforeCopy: TypeAlias = Callable[[list[Process]], None]
    _T = TypeVar("_T")
    _R = TypeVar("_R")


class _NoAnswer(CudaError):
    """The driver's word on a process cannot be had."""


class Policy:
    """How to suspend. `engine`: "auto", "driver" or "plugin"; `lock_timeout`: seconds within which
    every process must be locked; `copy_timeout`: seconds for device memory to reach the host, and
    for it to go back; `prefault`: the least bytes and the threads of `prefaulted`, if it is to be
    done; `plugin_dir`: where `cuda_plugin.so` lies; `criu_version`: asked only where
    the plugin engine is considered, raises or returns e.g. (4, 1, 1)."""

    __slots__ = (
        "copy_timeout",
        "criu_version",
        "engine",
        "lock_timeout",
        "plugin_dir",
        "prefault",
    )

    def __init__(
        self,
        *,
        engine: str,
        lock_timeout: float,
        copy_timeout: float,
        prefault: tuple[int, int] | None,
        plugin_dir: str,
        criu_version: Callable[[], tuple[int, int, int]],
    ) -> None:
        self.engine = engine
        self.lock_timeout = lock_timeout
        self.copy_timeout = copy_timeout
        self.prefault = prefault
        self.plugin_dir = plugin_dir
        self.criu_version = criu_version


def choose(policy: Policy, library: Library) -> str:
    """ "driver" or "plugin". Raises LibraryError that says why not."""
    against_driver = (
        f"{library.path} lacks {', '.join(library.missing)} (needs driver r570 or later)"
        if library.missing
        else ""
    )
    if policy.engine == "driver" or (policy.engine == "auto" and not against_driver):
        if against_driver:
            raise LibraryError(f"the driver engine cannot be used: {against_driver}")
        return "driver"
    against_plugin = _against_plugin(policy)
    if not against_plugin:
        return "plugin"
    if policy.engine == "plugin":
        raise LibraryError(f"the plugin engine cannot be used: {against_plugin}")
    raise LibraryError(
        f"no CUDA engine can be used. driver: {against_driver}. plugin: {against_plugin}"
    )


def _against_plugin(policy: Policy) -> str:
    plugin = os.path.join(policy.plugin_dir, "cuda_plugin.so")
    if not os.path.exists(plugin):
        return f"{plugin} does not exist"
    try:
        version = policy.criu_version()
    except Exception as error:
        return f"the version of CRIU cannot be had: {error}"
    if version < FIRST_PLUGIN_CRIU:
        return f"CRIU is {'.'.join(map(str, version))}, the plugin engine needs 4.1 or later"
    return ""


def suspend(
    pids: Pids, driver: Driver, policy: Policy, before_copy: BeforeCopy = lambda processes: None
) -> Suspension:
    """Locks all CUDA processes among `pids()`; with the driver engine also copies their device
    memory to the host and lets go of the GPU.

    `pids` is asked again until no new CUDA process shows up. Without any, nothing is started and
    nothing asked. `before_copy` gets the locked processes that are to be copied next, and may
    refuse by raising; it is not called with the plugin engine, which does not copy yet. Raises
    CudaError after undoing everything: no process then is in another state than it was found in,
    or the text says which is, as the driver itself reports."""
    return _Suspend(pids, driver, policy, before_copy).run()


def resume(suspension: Suspension, driver: Driver, policy: Policy) -> None:
    """Brings each process back to the state it was found in; may be called again.

    Acts on what the driver says now, not on the record, so it also mends what a killed CRIU or
    helper left behind. Processes that have died meanwhile are no error. Waits for others to free
    the device memory that is needed, as long as for a lock; none is restored without. Raises one
    CudaError for all that did not come back, after every other did."""
    errors = _bring_all_back(suspension.processes, driver, policy)
    if errors:
        raise CudaError(
            "the GPU was not given back: " + "; ".join(map(str, errors)),
            {process.pid: process.state for process in suspension.processes},
        )


def resume_restored(
    pids: Pids,
    expected: list[Process],
    driver: Driver,
    policy: Policy,
    *,
    engine: str,
    device_map: str = "",
) -> list[Process]:
    """After a CRIU restore: finds the processes recorded at the dump by their pids inside the
    container and gives them their GPU back ("plugin": checks that CRIU's plugin did). Returns them
    with their new pids.

    `device_map`: "GPU-old=GPU-new,..." for other GPUs than at the dump. They end up running
    whatever state the dump found them in: whoever had locked them is not here. Raises CudaError
    that names each which is not running."""
    by_inner: dict[tuple[int, ...], discovery.Candidate] = {}
    for pid in pids():
        try:
            found = discovery.identify(pid)
        except (OSError, discovery.ProcessGone):
            continue
        by_inner[found.inner] = found
    restored, absent = [], []
    for record in expected:
        twin = by_inner.get(record.inner)
        if twin is None:
            absent.append(
                f"the process that was pid {record.pid} ({record.comm}), "
                f"{record.inner[-1]} inside the container: not among the restored processes"
            )
            continue
        process = from_candidate(twin)
        process.before = record.before
        restored.append(process)

    def give_back(process: Process) -> None:
        if engine != "plugin":
            _bring_back(process, states.RUNNING, driver, policy, device_map)
        _verify(process, driver, states.RUNNING, "after the restore")

    errors, _ = _in_parallel(restored, give_back)
    failures = absent + [str(error) for error in errors]
    if failures:
        raise CudaError(
            "the GPU did not come back after the restore: " + "; ".join(failures),
            {process.pid: process.state for process in restored},
        )
    return restored


def missed(suspension: Suspension, pids: list[int]) -> list[discovery.Candidate]:
    """Processes that may have got CUDA after `suspend` looked: those not in it that hold an NVIDIA
    device open, and did not when it looked. Reads /proc only: for frozen containers."""
    known = {(process.pid, process.start_time) for process in suspension.processes}
    known |= {(pid, start_time) for pid, start_time, devices in suspension.idle if devices}
    return [c for c in discovery.candidates(pids) if c.devices and c.key not in known]


class _Suspend:
    """One run of `suspend`: what it has touched so far, to undo exactly that."""

    def __init__(self, pids: Pids, driver: Driver, policy: Policy, before_copy: BeforeCopy) -> None:
        self.pids = pids
        self.driver = driver
        self.policy = policy
        self.before_copy = before_copy
        self.began = time.monotonic()
        self.suspension = Suspension()

    def run(self) -> Suspension:
        try:
            self.lock_until_quiet()
            self.shed_inherited()
            if self.suspension.engine == "driver":
                self.copy_until_quiet()
        except Exception as error:
            raise self.undone(error) from error
        left = [p for p in self.suspension.processes if p.state != GONE]
        self.suspension.processes = sorted(left, key=lambda process: process.pid)
        self.suspension.seconds = time.monotonic() - self.began
        return self.suspension

    def lock_until_quiet(self) -> None:
        """Rounds of look and lock, until a round finds no process that has got CUDA since."""
        deadline = time.monotonic() + self.policy.lock_timeout
        while True:
            known = {(process.pid, process.start_time) for process in self.suspension.processes}
            fresh = [c for c in discovery.candidates(self.pids()) if c.key not in known]
            self.suspension.idle = [(*c.key, c.devices) for c in fresh]
            if not fresh or not self.engine_for(fresh):
                return
            errors, locked = _in_parallel(fresh, lambda c: self.lock(c, deadline))
            if errors:
                raise CudaError("; ".join(map(str, errors)))
            if not any(locked):
                return
            if time.monotonic() > deadline:
                raise CudaError(
                    f"new CUDA processes kept appearing for {self.policy.lock_timeout:.0f} s"
                )

    def engine_for(self, fresh: list[discovery.Candidate]) -> bool:
        """Settles which engine to use; False where there can be no CUDA process: a library that
        is mapped (images bring their own) on a node without driver and device."""
        if self.suspension.engine != "none":
            return True
        try:
            library = self.driver.library()
        except LibraryError:
            if any(candidate.devices for candidate in fresh):
                raise
            return False
        self.suspension.engine = choose(self.policy, library)
        self.suspension.library = library.path
        self.suspension.cuda_version = library.cuda_version
        return True

    def lock(self, candidate: discovery.Candidate, deadline: float) -> bool:
        """Whether it has CUDA; then it is locked now."""
        process = from_candidate(candidate)
        try:
            process.before = process.state = _ask(process, self.driver)
            if not process.before:
                return False
            tid = self.driver.call("restore_tid", process.pid, timeout=ANSWER_SECONDS)
            process.restore_tid = tid.value if tid.ok else 0
            self.suspension.processes.append(process)  # from here on it is ours to undo
            if process.before == states.FAILED:
                raise CudaError(
                    f"{process}: CUDA is in state failed, from which the driver knows no way back"
                )
            if process.before == states.RUNNING:
                left = max(deadline - time.monotonic(), 0.001)
                answer = self.driver.call(
                    "lock",
                    process.pid,
                    timeout=left + GRACE_SECONDS,
                    argument=str(max(int(left * 1000), 1)),
                )
                _note(process, "lock", answer, self.began)
                if not answer.ok:
                    raise CudaError(
                        f"{process}: not locked within {self.policy.lock_timeout:.0f} s: "
                        f"{_reason(answer)}"
                    )
                _verify(process, self.driver, states.LOCKED, "after its lock was granted")
            if process.state == states.LOCKED:
                self.measure(process)
        except CudaError:
            if discovery.alive(process.pid, process.start_time):
                raise
            process.state = GONE
        return process.state != GONE

    def measure(self, process: Process) -> None:
        """Notes how much device memory it holds, and where: locked, it can take no more."""
        try:
            survey = self.driver.survey([process.pid], timeout=ANSWER_SECONDS)
        except CudaError as error:  # no reason to give up: it is a question of our own
            process.note = str(error)
            return
        process.held_bytes = survey.used(process.pid)
        process.gpus = {use.uuid: use.bytes for use in survey.uses if use.bytes is not None}
        if process.held_bytes is None:
            process.note = survey.unknown or (
                "NVML lists it, with its memory as not available"
                if survey.uses
                else "NVML does not list it among the processes that use a GPU"
            )

    def shed_inherited(self) -> None:
        """Takes from the processes without CUDA what they inherited, by fork, of the GPU of those
        with it: now, as long as both have it in the same place. Where that does not work CRIU will
        say so, if it comes to a dump."""
        for pid, _, _ in self.suspension.idle:
            for parent in self.suspension.processes:
                try:
                    found = forked.inherited(pid, parent.pid)
                    if not found:
                        continue
                    answer = self.driver.call(
                        "shed", pid, timeout=ANSWER_SECONDS, argument=found.encode()
                    )
                    self.suspension.forked[pid] = "" if answer.ok else answer.name
                except (CudaError, OSError) as error:
                    self.suspension.forked[pid] = str(error)

    def copy_until_quiet(self) -> None:
        """Copies what is locked, and what has got CUDA while that was copied."""
        deadline = time.monotonic() + self.policy.copy_timeout
        while locked := [p for p in self.suspension.processes if p.state == states.LOCKED]:
            if time.monotonic() > deadline:
                raise CudaError(
                    f"new CUDA processes kept appearing for {self.policy.copy_timeout:.0f} s"
                )
            self.before_copy(locked)
            errors, _ = _in_parallel(locked, self.copy)
            if errors:
                raise CudaError("; ".join(map(str, errors)))
            self.lock_until_quiet()

    def copy(self, process: Process) -> None:
        try:
            before = discovery.anonymous_memory(process.pid)
            prefault = self.prefault(process)
            answer = self.driver.call(
                "checkpoint", process.pid, timeout=self.policy.copy_timeout, argument=prefault
            )
            _note(process, "checkpoint", answer, self.began)
            if not answer.ok:
                raise CudaError(
                    f"{process}: device memory was not copied to the host: {_reason(answer)}"
                    f"{limits.suspects(process.pid)}"
                )
            _verify(process, self.driver, states.CHECKPOINTED, "after the copy")
            new = discovery.appeared(before, discovery.anonymous_memory(process.pid))
        except (CudaError, OSError):
            if discovery.alive(process.pid, process.start_time):
                raise
            process.state = GONE
            return
        if new:
            process.region, process.regions = new[0], new
            process.device_bytes = new[0][1] - new[0][0]
            if prefault and answer.name:
                process.note = f"the memory for its copy was left to the kernel: {answer.name}"
        else:
            process.note = "the driver reports a copy, but no memory appeared in the process"

    def prefault(self, process: Process) -> str:
        if not (self.policy.prefault and process.restore_tid):
            return ""
        known = process.held_bytes or 0
        enough = known - known // 16  # a part of what NVML counts may stay where it is
        return ",".join(map(str, (process.restore_tid, *self.policy.prefault, enough)))

    def undone(self, error: Exception) -> CudaError:
        """Puts everything back and tells what became of it."""
        touched = self.suspension.processes[::-1]
        errors = _bring_all_back(touched, self.driver, self.policy)
        text = f"the GPU could not be suspended: {error}"
        if touched:
            text += ". Now, by the driver's word: " + ", ".join(
                f"{p} {'running again' if p.state == states.RUNNING else p.state.split(':')[0]}"
                for p in touched
            )
        if errors:
            text += ". Not undone: " + "; ".join(map(str, errors))
        late = [p for p in touched if p.state == p.before == states.RUNNING and not p.steps]
        if late:
            text += (
                ". A lock that was asked for and given up may yet be granted; if so, free it by "
                + ", ".join(f"`cuda-checkpoint --action unlock --pid {p.pid}`" for p in late)
            )
        return CudaError(text, {process.pid: process.state for process in touched})


def _bring_all_back(processes: list[Process], driver: Driver, policy: Policy) -> list[Exception]:
    """Each to the state it was found in; the errors of those that are not. Where a helper dies on
    the way, a fresh one goes on once more from what the driver says then."""
    errors = _bring_back_once(processes, driver, policy)
    if any(isinstance(error, HelperDied) for error in errors):
        errors = _bring_back_once(processes, driver, policy)
    return errors


def _bring_back_once(processes: list[Process], driver: Driver, policy: Policy) -> list[Exception]:
    try:
        room.wait_for_room(_to_restore(processes, driver), driver, policy.lock_timeout)
    except CudaError as error:
        return [error]
    errors, _ = _in_parallel(processes, lambda p: _bring_back(p, p.before, driver, policy, ""))
    return errors


def _to_restore(processes: list[Process], driver: Driver) -> list[Process]:
    """Those whose device memory is on the host and is to go back. Who cannot be asked is left
    out: what is wrong with it is told when it is brought back."""

    def found(process: Process) -> tuple[Process, str]:
        return process, _ask(process, driver, PATIENT_SECONDS)

    _, answers = _in_parallel(processes, found)
    return [p for p, state in answers if state == states.CHECKPOINTED != p.before]


def _bring_back(
    process: Process, target: str, driver: Driver, policy: Policy, device_map: str
) -> None:
    """From whatever state the driver reports to `target`. Leaves in `process.state` what the
    driver said last, GONE, or "unknown: <why>"."""
    began = time.monotonic()

    def act(action: str, timeout: float, argument: str = "") -> None:
        answer = driver.call(action, process.pid, timeout=timeout, argument=argument)
        _note(process, action, answer, began)
        process.state = _ask(process, driver) or GONE
        if not answer.ok and process.state != GONE:
            raise CudaError(f"{process}: {action} failed: {_reason(answer)}; it is {process.state}")

    def from_here() -> None:
        process.state = _ask(process, driver, PATIENT_SECONDS) or GONE
        if process.state == states.CHECKPOINTED != target:
            act("restore", policy.copy_timeout, device_map)
        if process.state == states.LOCKED and target == states.RUNNING:
            act("unlock", ANSWER_SECONDS)
        if process.state not in (target, GONE):
            raise CudaError(f"{process}: is {process.state}, should be {target}")

    try:
        try:
            from_here()
        except HelperDied:  # that is no word of the driver's: a new helper asks how far it came
            from_here()
    except CudaError as error:
        if not discovery.alive(process.pid, process.start_time):
            process.state = GONE
            return
        if isinstance(error, _NoAnswer | CallAbandoned | HelperDied):
            process.state = f"unknown: {error}"
        raise


def _ask(process: Process, driver: Driver, timeout: float = ANSWER_SECONDS) -> str:
    """The state by the driver's word; "" where the process has no CUDA, or is no more."""
    if not discovery.alive(process.pid, process.start_time):
        return ""
    why = discovery.standstill(process.pid)
    if why:
        raise _NoAnswer(f"{process} cannot answer the driver: it is {why}")
    answer = driver.call("state", process.pid, timeout=timeout)
    if answer.ok:
        return states.word(answer.value)
    if answer.code == states.NOT_INITIALIZED:
        return ""
    raise _NoAnswer(f"{process}: the driver did not say its state: {_reason(answer)}")


def _verify(process: Process, driver: Driver, wanted: str, when: str) -> None:
    process.state = _ask(process, driver)
    if process.state != wanted:
        raise CudaError(f"{process}: {process.state or 'without CUDA'} {when}, not {wanted}")


def _note(process: Process, step: str, answer: Answer, began: float) -> None:
    process.steps[step] = {"at": answer.started - began, "seconds": answer.ended - answer.started}


def _reason(answer: Answer) -> str:
    if answer.code == states.NOT_READY:
        return f"work in flight did not end ({answer.name})"
    return f"{answer.name} ({answer.code})"


def _in_parallel(items: Sequence[_T], work: Callable[[_T], _R]) -> tuple[list[Exception], list[_R]]:
    """Does `work` on all items at the same time; the errors and the results, in no order."""
    errors: list[Exception] = []
    results: list[_R] = []

    def one(item: _T) -> None:
        try:
            results.append(work(item))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=one, args=(item,), daemon=True) for item in items]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()  # ends: every call in `work` has a deadline
    return errors, results
