"""Our `cuda-checkpoint` as CRIU's plugin and an operator run it: a process of its own each time."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from shim.cuda import command, engine, record, states
from shim.cuda.driver import Driver
from shim.cuda.suspension import Suspension
from tests.cuda.conftest import ROOT, new_policy
from tests.cuda.freezer import Freezer
from tests.cuda.simulated import Workload
from tests.simgpu.simgpu import Kit, SimGpu

Start = Callable[..., Workload]
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(kit: Kit) -> Run:
    """Runs the command; `record_path`: with the record of a suspension."""

    def run(
        *arguments: object, record_path: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "LD_LIBRARY_PATH": str(kit.libcuda.parent)}
        if record_path:
            environment[record.VARIABLE] = str(record_path)
        return subprocess.run(
            [sys.executable, "-m", "shim.cuda.command", *map(str, arguments)],
            env=environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )

    return run


def test_help_mentions_what_crius_plugin_looks_for_within_what_it_reads(run: Run) -> None:
    done = run("-h")
    assert done.returncode == 0 and "--action" in done.stdout[:2047]
    assert run("--help").stdout == done.stdout


def test_a_process_goes_through_all_states(workload: Start, run: Run) -> None:
    one = workload()
    digest = one.do("digest")

    def state() -> str:
        done = run("--get-state", "--pid", one.pid)
        assert done.returncode == 0 and done.stderr == ""
        return done.stdout

    assert state() == "running\n"
    assert run("--action", "lock", "--pid", one.pid, "--timeout", "10000").returncode == 0
    assert state() == "locked\n"
    assert run("-a", "checkpoint", "-p", one.pid).returncode == 0
    assert state() == "checkpointed\n"
    assert run("--action=restore", f"--pid={one.pid}").returncode == 0
    assert state() == "locked\n"
    assert run("--action", "unlock", "--pid", one.pid).returncode == 0
    assert state() == "running\n"
    assert one.do("digest") == digest


def test_the_restore_thread_is_a_thread_of_the_process(workload: Start, run: Run) -> None:
    one = workload()
    done = run("--get-restore-tid", "--pid", one.pid)
    assert done.returncode == 0
    assert done.stdout.strip() in os.listdir(f"/proc/{one.pid}/task")


def test_a_process_without_cuda_fails_as_criu_expects(workload: Start, run: Run) -> None:
    idle = workload(cuda=False)
    for question in ("--get-restore-tid", "--get-state"):
        done = run(question, "--pid", idle.pid)
        assert done.returncode == 1
        assert "CUDA_ERROR_NOT_INITIALIZED" in done.stderr and str(idle.pid) in done.stderr


def test_toggle_goes_there_and_back(workload: Start, run: Run) -> None:
    one = workload()
    assert run("--toggle", "--pid", one.pid).returncode == 0
    assert run("--get-state", "--pid", one.pid).stdout == "checkpointed\n"
    assert run("--toggle", "--pid", one.pid).returncode == 0
    assert run("--get-state", "--pid", one.pid).stdout == "running\n"
    run("--action", "lock", "--pid", one.pid)
    done = run("--toggle", "--pid", one.pid)
    assert done.returncode == 1 and "is locked" in done.stderr


def test_a_lock_gives_up_at_its_timeout(board: SimGpu, workload: Start, run: Run) -> None:
    one = workload()
    board.fault("lock=never", one.pid)
    done = run("--action", "lock", "--pid", one.pid, "--timeout", "200")
    assert done.returncode == 1 and "CUDA_ERROR_NOT_READY (600)" in done.stderr
    assert run("--get-state", "--pid", one.pid).stdout == "running\n"


def test_a_device_map_reaches_the_driver(board: SimGpu, workload: Start, run: Run) -> None:
    one = workload()
    run("--toggle", "--pid", one.pid)
    here, elsewhere = f"GPU-{board.uuid(0)}", "GPU-00000000-0000-0000-0000-000000000001"
    wrong = run("-a", "restore", "-p", one.pid, "-d", f"{elsewhere}={elsewhere}")
    assert wrong.returncode == 1 and "INVALID_VALUE" in wrong.stderr
    assert run("-a", "restore", "-p", one.pid, "--device-map", f"{here}={here}").returncode == 0


def test_a_frozen_process_is_refused_instead_of_waited_for(
    workload: Start, run: Run, freezer: Freezer
) -> None:
    one = workload()
    freezer.add(one.pid)
    with freezer.frozen():
        done = run("--get-state", "--pid", one.pid)
    assert done.returncode == 1 and "frozen by cgroup" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((), "nothing to do"),
        (("--get-state",), "--pid takes a number"),
        (("--get-state", "--pid", "x"), "--pid takes a number, not 'x'"),
        (("--action", "jump", "--pid", "1"), "not 'jump'"),
        (("--get-state", "--toggle", "--pid", "1"), "one operation at a time"),
        (("--nonsense",), "unknown argument '--nonsense'"),
        (("--action", "lock", "--pid", "1", "--timeout", "-5"), "--timeout takes a number"),
    ],
)
def test_senseless_arguments_are_told_apart(
    arguments: tuple[str, ...], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(list(arguments)) == 1
    assert complaint in capsys.readouterr().err


# ---- with a record: within a dump by the plugin engine


@pytest.fixture
def locked(workload: Start, driver: Driver, tmp_path: Path) -> tuple[Workload, Path, Suspension]:
    """A process that the plugin engine has locked, and the record of it."""
    (tmp_path / "cuda_plugin.so").touch()
    policy = new_policy(engine="plugin")
    policy.plugin_dir = str(tmp_path)
    one = workload()
    suspension = engine.suspend(lambda: [one.pid], driver, policy)
    path = tmp_path / "record.json"
    record.write(str(path), suspension, nvidia_command="", timeout=60)
    return one, path, suspension


def test_questions_about_a_frozen_process_are_answered_from_the_record(
    locked: tuple[Workload, Path, Suspension], run: Run, freezer: Freezer
) -> None:
    one, path, suspension = locked
    tid = suspension.processes[0].restore_tid
    freezer.add(one.pid)
    with freezer.frozen():
        asked = run("--get-restore-tid", "--pid", one.pid, record_path=path)
        assert (asked.returncode, asked.stdout) == (0, f"{tid}\n")
        for pid in (one.pid, tid):  # CRIU asks the state of the restore thread
            asked = run("--get-state", "--pid", pid, record_path=path)
            assert (asked.returncode, asked.stdout) == (0, "locked\n")


def test_a_process_outside_the_record_has_no_cuda_and_the_driver_is_not_asked(
    locked: tuple[Workload, Path, Suspension], workload: Start, run: Run, board: SimGpu
) -> None:
    _, path, _ = locked
    other = workload()
    board.fault("getstate=hang", other.pid)
    for question in ("--get-restore-tid", "--get-state"):
        done = run(question, "--pid", other.pid, record_path=path)
        assert done.returncode == 1 and "no CUDA" in done.stderr


def test_actions_are_carried_out_and_noted(
    locked: tuple[Workload, Path, Suspension], run: Run, driver: Driver
) -> None:
    one, path, _ = locked
    for action, state in (
        ("checkpoint", "checkpointed"),
        ("restore", "locked"),
        ("unlock", "running"),
    ):
        done = run("--action", action, "--pid", one.pid, record_path=path)
        assert (done.returncode, done.stderr) == (0, "")
        assert run("--get-state", "--pid", one.pid, record_path=path).stdout == f"{state}\n"
        answer = driver.call("state", one.pid, timeout=30)
        assert states.word(answer.value) == state
    assert [file.name for file in path.parent.glob("record*")] == ["record.json"]


def test_an_action_that_fails_is_told_and_not_noted(
    locked: tuple[Workload, Path, Suspension], run: Run, board: SimGpu
) -> None:
    one, path, _ = locked
    board.fault("checkpoint=304", one.pid)
    done = run("--action", "checkpoint", "--pid", one.pid, record_path=path)
    assert done.returncode == 1 and "CUDA_ERROR_OPERATING_SYSTEM (304)" in done.stderr
    assert run("--get-state", "--pid", one.pid, record_path=path).stdout == "locked\n"


def test_an_action_that_hangs_ends_at_the_records_timeout(
    locked: tuple[Workload, Path, Suspension], run: Run, board: SimGpu
) -> None:
    one, path, suspension = locked
    record.write(str(path), suspension, nvidia_command="", timeout=1)
    board.fault("checkpoint=hang", one.pid)
    done = run("--action", "checkpoint", "--pid", one.pid, record_path=path)
    assert done.returncode != 0
    board.fault("", one.pid)


def test_where_libcuda_lacks_the_calls_nvidias_command_carries_them_out(
    locked: tuple[Workload, Path, Suspension],
    run: Run,
    driver: Driver,
    old_libcuda: Path,
    nvidia_command: Path,
) -> None:
    one, path, suspension = locked
    suspension.library = str(old_libcuda)
    record.write(str(path), suspension, nvidia_command="", timeout=60)
    done = run("--action", "unlock", "--pid", one.pid, record_path=path)
    assert done.returncode == 1 and "driver r570" in done.stderr

    record.write(str(path), suspension, nvidia_command=str(nvidia_command), timeout=60)
    done = run("--action", "unlock", "--pid", one.pid, record_path=path)
    assert (done.returncode, done.stderr) == (0, "")
    assert driver.call("state", one.pid, timeout=30).value == states.WORDS.index("running")
