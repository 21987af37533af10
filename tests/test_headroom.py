"""Room for the copy of device memory: the sums over made-up control groups of both versions, and
what is refused, raised and put back."""

from __future__ import annotations

import copy
import errno
import types
from pathlib import Path
from typing import Any

import pytest

from shim import headroom, memcg
from shim.config import GritOptions
from shim.container import Restore
from shim.cuda.suspension import Process
from shim.manifest import File, Manifest

MIB = 1 << 20
UNLIMITED = 9223372036854771712  # what v1 says, on x86-64


def write(group: Path, **values: object) -> Path:
    """A control group's files: `memory_max=1` is the file memory.max."""
    group.mkdir(parents=True, exist_ok=True)
    (group / "cgroup.procs").touch()
    for name, text in values.items():
        (group / name.replace("_", ".", 1)).write_text(f"{text}\n")
    return group


def v2(group: Path, limit: object, used: int, cache: int = 0, high: object = "max") -> Path:
    stat = f"anon {used - cache}\ninactive_file {cache // 2}\nactive_file {cache - cache // 2}"
    return write(group, memory_max=limit, memory_high=high, memory_current=used, memory_stat=stat)


def v1(group: Path, limit: int, used: int, cache: int = 0, both: int = UNLIMITED) -> Path:
    """`both`: memory and swap together. The group's own share of the cache is none."""
    total = f"total_inactive_file {cache // 2}\ntotal_active_file {cache - cache // 2}"
    write(
        group,
        memory_limit_in_bytes=limit,
        memory_usage_in_bytes=used,
        memory_stat=f"inactive_file 0\nactive_file 0\n{total}",
    )
    (group / "memory.memsw.limit_in_bytes").write_text(f"{both}\n")
    (group / "memory.memsw.usage_in_bytes").write_text(f"{used}\n")
    return group


class Container:
    """What headroom asks of a container."""

    def __init__(self, group: Path, memory: str) -> None:
        self.id = "c1"
        self.config = GritOptions(memory=memory)
        self.raised_limits: dict[str, tuple[int, int]] = {}
        self.group = str(group)

    def memory_group(self) -> str:
        return self.group


def container(group: Path, memory: str = "refuse") -> Any:
    return Container(group, memory)


def process(held: int | None, pid: int = 7) -> Process:
    return Process(pid, 1, (1,), "trainer", held_bytes=held, note="" if held else "no NVML here")


@pytest.fixture(autouse=True)
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A node with 1 GiB to give."""
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 4194304 kB\nMemAvailable: 1048576 kB\n")
    monkeypatch.setattr(headroom, "_MEMINFO", str(meminfo))
    monkeypatch.setattr(headroom, "_SETTLE_SECONDS", 0.2)
    return meminfo


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is logged."""
    logged: list[str] = []

    def note(level: str) -> Any:
        return lambda message, **fields: logged.append(f"{level} {message} {fields}")

    recorder = types.SimpleNamespace(**{name: note(name) for name in ("info", "warning", "error")})
    monkeypatch.setattr(headroom, "log", recorder)
    return logged


def text(group: Path, name: str) -> int:
    return int((group / name).read_text())


# ---- the limits in force


@pytest.mark.parametrize("make", [v1, v2])
def test_page_cache_counts_as_free(tmp_path: Path, make: Any) -> None:
    group = make(tmp_path / "g", 100 * MIB, 90 * MIB, cache=60 * MIB)
    (limit,) = memcg.limits(str(group))
    assert (limit.value, limit.free) == (100 * MIB, 70 * MIB)


def test_limits_up_to_the_root_innermost_first(tmp_path: Path) -> None:
    pod = v2(tmp_path / "root" / "pod", 200 * MIB, 50 * MIB)
    group = v2(pod / "c1", 100 * MIB, 40 * MIB, high=90 * MIB)
    write(tmp_path / "root")  # a root group has no limit and no usage
    found = [(limit.group, limit.value, limit.free) for limit in memcg.limits(str(group))]
    assert found == [
        (str(group), 100 * MIB, 60 * MIB),
        (str(group), 90 * MIB, 50 * MIB),
        (str(pod), 200 * MIB, 150 * MIB),
    ]


def test_no_limit_is_none(tmp_path: Path) -> None:
    assert memcg.limits(str(v2(tmp_path / "two", "max", 50 * MIB))) == []
    assert memcg.limits(str(v1(tmp_path / "one", UNLIMITED, 50 * MIB))) == []
    assert memcg.limits(str(tmp_path / "gone")) == []


def test_memory_and_swap_together_are_a_limit_of_v1(tmp_path: Path) -> None:
    group = v1(tmp_path / "g", 100 * MIB, 40 * MIB, both=120 * MIB)
    assert [limit.free for limit in memcg.limits(str(group))] == [60 * MIB, 80 * MIB]


# ---- whether it fits


def test_what_a_process_needs() -> None:
    """Measured (H200, r580): figure of NVML, size of the region, growth of the process."""
    for held, region, grown in [
        (543162368, 553013248, 477540352),
        (2929721344, 2940358656, 2864881664),
        (17723031552, 17732882432, 17657409536),
    ]:
        assert headroom.copy_bytes(held) > region + region // 512 > grown
        assert headroom.copy_bytes(held) < region * 1.13


@pytest.mark.parametrize("make", [v1, v2])
def test_what_fits_is_left_alone(tmp_path: Path, make: Any) -> None:
    group = make(tmp_path / "g", 300 * MIB, 250 * MIB, cache=220 * MIB)
    one = container(group)
    headroom.make_room(one, [process(100 * MIB)])
    assert one.raised_limits == {}


@pytest.mark.parametrize("make", [v1, v2])
def test_what_does_not_fit_is_refused_with_all_the_figures(tmp_path: Path, make: Any) -> None:
    group = make(tmp_path / "g", 300 * MIB, 150 * MIB)
    with pytest.raises(headroom.NoRoom) as caught:
        headroom.make_room(container(group), [process(100 * MIB), process(0, pid=8)])
    told = str(caught.value)
    assert "container c1" in told and "pid 7 (trainer), pid 8 (trainer)" in told
    assert "228.2 MiB on the host" in told
    assert f"{group}/memory." in told and "is 300.0 MiB, of which 150.0 MiB are free" in told
    assert 'set memory = "raise"' in told


def test_slowing_down_is_as_good_as_a_limit(tmp_path: Path) -> None:
    group = v2(tmp_path / "g", "max", 150 * MIB, high=200 * MIB)
    with pytest.raises(headroom.NoRoom, match=r"memory\.high is 200\.0 MiB"):
        headroom.make_room(container(group), [process(100 * MIB)])


@pytest.mark.parametrize("memory", ["refuse", "raise"])
def test_the_node_has_to_have_it(tmp_path: Path, node: Path, memory: str) -> None:
    group = v2(tmp_path / "g", 300 * MIB, 150 * MIB)
    node.write_text(f"MemAvailable: {100 << 10} kB\n")
    with pytest.raises(headroom.NoRoom, match=r"the node has 100\.0 MiB available"):
        headroom.make_room(container(group, memory), [process(100 * MIB)])
    assert text(group, "memory.max") == 300 * MIB


def test_unknown_is_said_and_not_refused(tmp_path: Path, lines: list[str], node: Path) -> None:
    group = v2(tmp_path / "g", 300 * MIB, 300 * MIB)
    node.write_text("MemAvailable: 0 kB\n")
    headroom.make_room(container(group), [process(None)])
    (line,) = lines
    assert line.startswith("warning") and "no NVML here" in line and "'pid': 7" in line


# ---- raise, and put back


def test_raised_by_the_need_and_put_back(tmp_path: Path) -> None:
    group = v1(tmp_path / "g", 300 * MIB, 150 * MIB, both=400 * MIB)
    one = container(group, "raise")
    need = headroom.copy_bytes(200 * MIB)
    headroom.make_room(one, [process(200 * MIB)])
    assert text(group, "memory.limit_in_bytes") == 300 * MIB + need
    assert text(group, "memory.memsw.limit_in_bytes") == 400 * MIB + need
    headroom.put_back(one)
    assert text(group, "memory.limit_in_bytes") == 300 * MIB
    assert text(group, "memory.memsw.limit_in_bytes") == 400 * MIB
    assert one.raised_limits == {}


def test_the_limit_with_swap_is_never_the_lower_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """v1 refuses to be set so, even in between."""
    group = v1(tmp_path / "g", 300 * MIB, 150 * MIB, both=300 * MIB)
    real = memcg.set_limit

    def checked(file: str, bytes_: int) -> None:
        real(file, bytes_)
        both = text(group, "memory.memsw.limit_in_bytes")
        assert text(group, "memory.limit_in_bytes") <= both

    monkeypatch.setattr(memcg, "set_limit", checked)
    one = container(group, "raise")
    headroom.make_room(one, [process(200 * MIB)])
    headroom.put_back(one)
    assert one.raised_limits == {}


def test_raised_twice_goes_back_to_the_first(tmp_path: Path) -> None:
    group = v2(tmp_path / "g", 100 * MIB, 90 * MIB)
    one = container(group, "raise")
    headroom.make_room(one, [process(10 * MIB)])
    v2(
        group, text(group, "memory.max"), text(group, "memory.max") - MIB
    )  # the first copy lies there
    headroom.make_room(one, [process(20 * MIB)])
    assert text(group, "memory.max") == 100 * MIB + sum(
        map(headroom.copy_bytes, (10 * MIB, 20 * MIB))
    )
    v2(group, text(group, "memory.max"), 90 * MIB)
    headroom.put_back(one)
    assert text(group, "memory.max") == 100 * MIB


@pytest.mark.parametrize("make", [v1, v2])
def test_what_is_above_the_container_is_not_raised(tmp_path: Path, make: Any) -> None:
    pod = make(tmp_path / "pod", 310 * MIB, 160 * MIB)
    group = make(pod / "c1", 300 * MIB, 150 * MIB)
    one = container(group, "raise")
    with pytest.raises(headroom.NoRoom, match=r"pod/memory\..* is 310\.0 MiB.*not ours to raise"):
        headroom.make_room(one, [process(100 * MIB)])
    assert one.raised_limits == {}


def test_a_limit_is_not_lowered_onto_what_is_in_use(tmp_path: Path, lines: list[str]) -> None:
    """On v2 the kernel would kill to make it true."""
    group = v2(tmp_path / "g", 100 * MIB, 90 * MIB)
    one = container(group, "raise")
    headroom.make_room(one, [process(50 * MIB)])
    raised = text(group, "memory.max")
    v2(group, raised, 110 * MIB)
    headroom.put_back(one)
    assert text(group, "memory.max") == raised
    assert lines[-1].startswith("error a raised memory limit could not be put back")
    assert f"'now': {raised}, 'was': {100 * MIB}" in lines[-1]
    assert f"echo {100 * MIB} > {group}/memory.max" in lines[-1]
    v2(group, raised, 110 * MIB, cache=20 * MIB)
    headroom.put_back(one)
    assert text(group, "memory.max") == 100 * MIB


def test_a_limit_that_the_kernel_is_not_ready_to_lower_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = v1(tmp_path / "g", 100 * MIB, 90 * MIB)
    one = container(group, "raise")
    headroom.make_room(one, [process(50 * MIB)])
    real, busy = memcg.set_limit, [1, 2]

    def reluctant(file: str, bytes_: int) -> None:
        if busy:
            busy.pop()
            raise OSError(errno.EBUSY, "busy")
        real(file, bytes_)

    monkeypatch.setattr(memcg, "set_limit", reluctant)
    headroom.put_back(one)
    assert text(group, "memory.limit_in_bytes") == 100 * MIB


def test_a_limit_that_somebody_else_set_meanwhile_stays(tmp_path: Path, lines: list[str]) -> None:
    group = v2(tmp_path / "g", 100 * MIB, 90 * MIB)
    one = container(group, "raise")
    headroom.make_room(one, [process(50 * MIB)])
    (group / "memory.max").write_text(str(500 * MIB))
    headroom.put_back(one)
    assert text(group, "memory.max") == 500 * MIB
    assert one.raised_limits == {} and "somebody else" in lines[-1]


def test_a_container_that_is_gone_has_no_limit_to_put_back(
    tmp_path: Path, lines: list[str]
) -> None:
    group = v2(tmp_path / "g", 100 * MIB, 90 * MIB)
    one = container(group, "raise")
    headroom.make_room(one, [process(50 * MIB)])
    lines.clear()
    group.rename(tmp_path / "elsewhere")
    headroom.put_back(one)
    assert one.raised_limits == {} and lines == []


# ---- a restore


def restoring(pages: int, *held: int, engine: str = "driver") -> Restore:
    manifest = Manifest(
        container_id="c1",
        namespace="default",
        image="",
        runtime="",
        engine=engine,
        driver_version=None,
        gpus=[],
        criu_version="",
        kernel="",
        hostname="",
        options={},
        cuda_processes=[process(one, pid).to_dict() for pid, one in enumerate(held, 7)],
        phases={},
    )
    manifest.files = {
        "pages-1.img": File(pages - MIB, ""),
        "pages-2.img": File(MIB, ""),
        "mm-1.img": File(MIB, ""),
    }
    return Restore("/images", manifest, None)


def spec(limit: int, swap: int = 0) -> dict[str, Any]:
    return {"linux": {"resources": {"memory": {"limit": limit, "swap": swap}}}}


def test_images_that_cannot_fit_are_refused(tmp_path: Path) -> None:
    one, found = container(tmp_path), restoring(300 * MIB, 200 * MIB)
    with pytest.raises(headroom.NoRoom, match=r"holds 300\.0 MiB .* limit is 299\.0 MiB"):
        headroom.make_room_for_restore(one, found, spec(299 * MIB))
    for fits in (spec(300 * MIB), spec(0), {}):
        headroom.make_room_for_restore(one, found, fits)


def test_compressed_memory_counts_as_it_will_be(tmp_path: Path) -> None:
    one, found = container(tmp_path), restoring(100 * MIB, 200 * MIB)
    assert found.manifest is not None
    found.manifest.files["lane-7-0-0.img"] = File(20 * MIB, "")
    found.manifest.cuda_processes[0]["lane"] = [["lane-7-0-0.img", 0, 200 * MIB, "", "zstd"]]
    with pytest.raises(headroom.NoRoom, match=r"holds 300\.0 MiB .* limit is 299\.0 MiB"):
        headroom.make_room_for_restore(one, found, spec(299 * MIB))
    headroom.make_room_for_restore(one, found, spec(300 * MIB))


@pytest.mark.parametrize("memory", ["refuse", "raise"])
def test_images_that_the_node_has_no_memory_for_are_refused(
    tmp_path: Path, node: Path, memory: str
) -> None:
    node.write_text(f"MemAvailable: {100 << 10} kB\n")
    with pytest.raises(headroom.NoRoom, match=r"the node has 100\.0 MiB available"):
        headroom.make_room_for_restore(container(tmp_path, memory), restoring(101 * MIB, MIB), {})


def test_a_raised_restore_is_put_back_once_it_runs(tmp_path: Path) -> None:
    group = tmp_path / "g"
    one, found = container(group, "raise"), restoring(300 * MIB, 100 * MIB, 50 * MIB)
    asked = spec(200 * MIB, 400 * MIB)
    headroom.make_room_for_restore(one, found, asked)
    memory = asked["linux"]["resources"]["memory"]
    need = headroom.copy_bytes(100 * MIB) + headroom.copy_bytes(50 * MIB)
    assert memory == {"limit": 200 * MIB + need, "swap": 400 * MIB + need}
    v1(group, memory["limit"], 150 * MIB, both=memory["swap"])  # as runc makes it
    headroom.restored(one, found)
    assert text(group, "memory.limit_in_bytes") == 200 * MIB
    assert text(group, "memory.memsw.limit_in_bytes") == 400 * MIB


def test_no_limit_is_none_to_raise(tmp_path: Path) -> None:
    one, found = container(tmp_path, "raise"), restoring(300 * MIB, 100 * MIB)
    for unlimited in (spec(0), spec(-1, -1), {}, {"linux": {"resources": {"memory": None}}}):
        before = copy.deepcopy(unlimited)
        headroom.make_room_for_restore(one, found, unlimited)
        assert (unlimited, found.raised_limits) == (before, {})
