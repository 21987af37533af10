"""The binding: what is loaded, what is missing, and that it is in step with its declarations."""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

import pytest

from shim.cuda import declarations, engine, libcuda, states
from shim.cuda.driver import Driver, Library
from shim.cuda.errors import CallAbandoned, HelperDied, LibraryError
from shim.cuda.libcuda import LibCuda, parse_device_map
from tests.cuda.conftest import ROOT, new_policy
from tests.simgpu.simgpu import Kit


@pytest.mark.parametrize("module", declarations.MODULES)
def test_the_generated_declarations_are_in_step(tmp_path: Path, module: str) -> None:
    declarations.generate(module, str(tmp_path))
    fresh, kept = (Path(place, f"{module}.py") for place in (tmp_path, declarations.DIRECTORY))
    assert fresh.read_text() == kept.read_text()


def test_every_argument_structure_has_the_drivers_size() -> None:
    from shim.cuda._libcuda import ffi

    for name in ("lock_args", "checkpoint_args", "restore_args", "unlock_args"):
        assert ffi.sizeof(name) == 64
    assert ffi.sizeof("gpu_pair") == 32
    assert ffi.offsetof("restore_args", "gpu_pairs_count") == 8


def test_a_process_that_is_not_there_is_an_error_with_the_drivers_name(kit: Kit) -> None:
    cuda = LibCuda(str(kit.libcuda))
    assert cuda.missing == () and cuda.cuda_version == 13000
    code, _ = cuda.state(2**22 + 1)
    assert cuda.error_name(code) == "CUDA_ERROR_INVALID_VALUE"


def test_an_old_driver_is_told_with_the_version_that_would_do(old_libcuda: Path) -> None:
    cuda = LibCuda(str(old_libcuda))
    assert "cuCheckpointProcessLock" in cuda.missing
    with pytest.raises(LibraryError, match=r"CUDA 12\.4.*cuCheckpointProcessLock.*driver r570"):
        cuda.lock(1, 0)
    assert cuda.error_name(600) == "CUDA_ERROR_NOT_READY"


def test_a_configured_library_that_cannot_be_loaded_is_no_reason_to_take_another(
    tmp_path: Path,
) -> None:
    with pytest.raises(LibraryError, match="configured libcuda cannot be loaded"):
        LibCuda(str(tmp_path / "libcuda.so.1"))


LOAD = """
import sys
sys.path.insert(0, sys.argv[1])
from shim.cuda import libcuda
libcuda.DIRECTORIES = tuple(sys.argv[2:])
from shim.cuda.errors import LibraryError
try:
    found = libcuda.LibCuda()
    print(found.path, found.cuda_version, *found.missing)
except LibraryError as error:
    print(error)
"""


def load(*directories: Path, env: dict[str, str] | None = None) -> str:
    """What is found, in a process that has loaded none yet, where these are the places to look."""
    words = [sys.executable, "-c", LOAD, str(ROOT), *map(str, directories)]
    done = subprocess.run(words, capture_output=True, text=True, check=True, env=env or {})
    return done.stdout.strip()


def test_the_library_is_found_in_the_loaders_path(kit: Kit) -> None:
    env = {"LD_LIBRARY_PATH": str(kit.libcuda.parent)}
    assert load(Path("/nowhere"), env=env) == "libcuda.so.1 13000"


def test_the_library_is_found_in_a_driver_containers_root(kit: Kit, old_libcuda: Path) -> None:
    assert load(Path("/nowhere"), kit.libcuda.parent) == f"{kit.libcuda} 13000"
    found = load(old_libcuda.parent, kit.libcuda.parent).split()
    assert found[:2] == [str(old_libcuda), "12040"]
    assert found[2:] == list(libcuda.CALLS)


def test_what_cannot_be_loaded_does_not_end_the_search(kit: Kit, tmp_path: Path) -> None:
    (tmp_path / "libcuda.so.1").write_text("not a library")
    assert load(tmp_path, kit.libcuda.parent) == f"{kit.libcuda} 13000"


def test_without_a_library_every_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "libcuda.so.1").write_text("not a library")
    told = load(tmp_path, Path("/nowhere"))
    assert f"{tmp_path}/libcuda.so.1: " in told
    assert f"in the loader's path and in {tmp_path}, /nowhere)" in told
    assert "is the NVIDIA driver installed?" in told and "`libcuda` under [grit]" in told


def test_the_gpu_operators_root_is_looked_into() -> None:
    assert "/run/nvidia/driver/usr/lib/x86_64-linux-gnu" in libcuda.DIRECTORIES
    assert "/home/kubernetes/bin/nvidia/lib64" in libcuda.DIRECTORIES


def test_device_maps() -> None:
    old, new = "GPU-00112233-4455-6677-8899-aabbccddeeff", "GPU-" + "0" * 31 + "1"
    (pair,) = parse_device_map(f"{old}={new}")
    assert pair == (bytes.fromhex("00112233445566778899aabbccddeeff"), bytes(15) + b"\1")
    assert parse_device_map("") == []
    for wrong in ("GPU-1=GPU-2", old, f"{old}={new},x"):
        with pytest.raises(LibraryError, match="device map"):
            parse_device_map(wrong)


def test_the_helper_tells_what_it_loaded(kit: Kit, old_libcuda: Path) -> None:
    with_calls = Driver(sys.executable, str(kit.libcuda))
    library = with_calls.library()
    assert (library.path, library.cuda_version) == (str(kit.libcuda), 13000)
    assert library.missing == ()
    with_calls.close()
    without = Driver(sys.executable, str(old_libcuda))
    assert len(without.library().missing) == 6
    answer = without.call("state", 1, timeout=30)
    assert not answer.ok and "driver r570" in answer.name
    without.close()


def test_a_helper_that_cannot_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(HelperDied, match="cannot be started"):
        Driver(str(tmp_path / "python3")).library()
    with pytest.raises(HelperDied, match="did not start: exit status 1"):
        Driver("/bin/false").library()


def test_a_helper_without_cffi_says_so(tmp_path: Path) -> None:
    venv.create(tmp_path)
    with pytest.raises(HelperDied, match="No module named '_cffi_backend'"):
        Driver(str(tmp_path / "bin" / "python3")).library()


def test_a_closed_driver_starts_anew(kit: Kit) -> None:
    driver = Driver(sys.executable, str(kit.libcuda))
    for _ in range(2):
        assert driver.call("state", 2**22 + 1, timeout=30).code == 1
        driver.close()


def test_a_helper_that_never_gets_ready_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shim.cuda.driver.START_SECONDS", 0.2)
    monkeypatch.setattr("shim.cuda.driver._PROGRAM", "import time; time.sleep(600)")
    with pytest.raises(CallAbandoned, match="did not load libcuda"):
        Driver(sys.executable).library()


# ---- which engine

CALLS = Library("/lib/libcuda.so.1", 12080, ())
NO_CALLS = Library("/lib/libcuda.so.1", 12040, ("cuCheckpointProcessLock",))


def test_auto_takes_the_driver_where_it_has_the_calls() -> None:
    assert engine.choose(new_policy(engine="auto"), CALLS) == "driver"


def test_auto_takes_the_plugin_where_the_driver_is_too_old(tmp_path: Path) -> None:
    (tmp_path / "cuda_plugin.so").touch()
    policy = new_policy(engine="auto")
    policy.plugin_dir = str(tmp_path)
    assert engine.choose(policy, NO_CALLS) == "plugin"
    policy.criu_version = lambda: (4, 0, 0)
    with pytest.raises(LibraryError, match=r"driver: .*r570.* plugin: CRIU is 4\.0\.0"):
        engine.choose(policy, NO_CALLS)


def test_an_engine_that_was_asked_for_is_not_replaced_by_another() -> None:
    with pytest.raises(LibraryError, match=r"driver engine cannot be used.*r570"):
        engine.choose(new_policy(engine="driver"), NO_CALLS)
    with pytest.raises(LibraryError, match=r"plugin engine cannot be used.*cuda_plugin\.so"):
        engine.choose(new_policy(engine="plugin"), CALLS)


def test_a_criu_that_cannot_be_asked_is_a_reason(tmp_path: Path) -> None:
    def broken() -> tuple[int, int, int]:
        raise OSError("no criu here")

    (tmp_path / "cuda_plugin.so").touch()
    policy = new_policy(engine="plugin")
    policy.plugin_dir, policy.criu_version = str(tmp_path), broken
    with pytest.raises(LibraryError, match="no criu here"):
        engine.choose(policy, CALLS)


def test_words_for_states() -> None:
    assert [states.word(n) for n in range(5)] == [
        "running",
        "locked",
        "checkpointed",
        "failed",
        "state 4",
    ]
