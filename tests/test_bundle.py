"""The bundle's files and the group's records."""

from __future__ import annotations

import concurrent.futures
import json
import os
import subprocess
from pathlib import Path

import pytest

from shim import bundle, cgroup, group, places, start


def test_containers_are_grouped_by_the_first_annotation_that_is_set() -> None:
    ours, pods = "io.containerd.runc.v2.group", "io.kubernetes.cri.sandbox-id"
    assert bundle.grouping({"annotations": {pods: "pod", ours: "team"}}, "one") == "team"
    assert bundle.grouping({"annotations": {pods: "pod", ours: ""}}, "one") == "pod"
    assert bundle.grouping({"annotations": None}, "one") == "one"


@pytest.mark.parametrize(
    "answer", ["unix:///run/s/a", json.dumps({"version": 3, "address": "unix:///run/s/a"})]
)
def test_an_address_is_found_in_either_form(tmp_path: Path, answer: str) -> None:
    bundle.write_address(str(tmp_path), answer)
    assert bundle.read_address(str(tmp_path)) == "unix:///run/s/a"
    assert os.listdir(tmp_path) == ["address"]


def test_containerd_2_records_the_address_itself(tmp_path: Path) -> None:
    text = json.dumps({"version": 3, "address": "unix:///run/s/b", "protocol": "ttrpc"})
    (tmp_path / "bootstrap.json").write_text(text)
    assert bundle.read_address(str(tmp_path)) == "unix:///run/s/b"


@pytest.mark.parametrize("text", ["", "{", "\xff"])
def test_a_broken_address_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "address").write_bytes(text.encode("latin-1"))
    assert bundle.read_address(str(tmp_path)) == ""


def test_the_specification_is_replaced_whole_and_keeps_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text("{}")
    path.chmod(0o640)
    bundle.write_spec(str(tmp_path), {"annotations": {"a": "b"}})
    assert bundle.read_spec(str(tmp_path)) == {"annotations": {"a": "b"}}
    assert path.stat().st_mode & 0o777 == 0o640
    assert os.listdir(tmp_path) == ["config.json"]


def test_the_run_directory_is_named_like_the_socket() -> None:
    assert places.group_directory("unix:///run/containerd/s/abc") == f"{places.RUN}/abc"


def test_a_recorded_process_is_known_by_its_start_time_too(tmp_path: Path) -> None:
    home = str(tmp_path)
    with subprocess.Popen(["sleep", "60"]) as process:
        group.record_process(home, "inner", process.pid)
        assert group.living_process(home, "inner") == process.pid
        assert group.living_process(home, "outer") == 0
        process.kill()
    assert group.living_process(home, "inner") == 0
    (tmp_path / "processes").write_text(f"inner {os.getpid()} 1\n")
    assert group.living_process(home, "inner") == 0, "the pid is somebody else's now"


def test_a_group_is_gone_when_removed_and_may_be_removed_twice(tmp_path: Path) -> None:
    home = str(tmp_path / "group")
    group.prepare(home, "pod", "/bundle/log")
    group.record_answer(home, "unix:///x")
    group.add_task(home, "one", "/bundle")
    assert group.tasks(home) == {"one": "/bundle"}
    assert not group.is_over(home)
    assert group.answer(home) == "unix:///x"
    annotation = json.loads((tmp_path / "group/config.json").read_text())["annotations"]
    assert annotation == {"io.containerd.runc.v2.group": "grit-inner-pod"}
    group.remove_task(home, "one")
    group.remove_task(home, "one")
    assert group.is_over(home)
    group.add_task(home, "two", "/bundle")
    assert not group.is_over(home)
    group.remove(home)
    group.remove(home)
    assert group.tasks(home) == {} and not os.path.exists(home)


def test_a_start_outlasts_a_daemon_whose_last_task_is_gone(tmp_path: Path) -> None:
    """Joining it would lose the connection as it ends (a task deleted and made anew at once)."""
    home = str(tmp_path / "group")
    lock = group.lock(home)
    with subprocess.Popen(["sleep", "60"]) as daemon:
        group.record_process(home, "outer", daemon.pid)
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(start._outlast, home, lock)
            with pytest.raises(concurrent.futures.TimeoutError):
                waiting.result(0.2)
            os.close(group.lock(home))  # which the daemon needs to end
            daemon.kill()
            os.close(waiting.result(10))


def test_processes_of_groups_below_count(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "cgroup.procs").write_text("7\n0\n")
    (tmp_path / "below/cgroup.procs").write_text("9\n")
    assert sorted(cgroup.processes(str(tmp_path))) == [7, 9]
    assert cgroup.processes(str(tmp_path / "gone")) == []


def test_the_criu_configuration_of_a_restore_is_not_that_of_the_next_dump(tmp_path: Path) -> None:
    place = str(tmp_path)
    ours = f"{place}/{bundle.RESTORE_CONFIG}"
    assert bundle.criu_config_before(place, "/etc/criu/runc.conf") == "/etc/criu/runc.conf"
    assert bundle.criu_config_before(place, None) is None
    assert bundle.criu_config_before(place, ours) is None  # nothing was noted
    bundle.replace(f"{place}/{bundle.BASE_CONFIG}", "/etc/criu/mine.conf", mode=0o600)
    assert bundle.criu_config_before(place, ours) == "/etc/criu/mine.conf"
    bundle.replace(f"{place}/{bundle.BASE_CONFIG}", "", mode=0o600)  # the annotation was empty
    assert bundle.criu_config_before(place, ours) is None
