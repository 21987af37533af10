"""What a dump request is made of, where a running container is not needed to see it. That the
whole is what runc sends is seen in test_real_criu.py."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from shim import runcstate
from shim.criu_bridge import request, rpc


def state(**config: Any) -> runcstate.RunState:
    """A container whose init is this very process."""
    data = {
        "id": "c1",
        "init_process_pid": os.getpid(),
        "init_process_start": 1,
        "config": {"rootfs": "/run/c1/rootfs", "labels": [], **config},
        "cgroup_paths": {"": "/sys/fs/cgroup/c1"},
        "external_descriptors": ["/dev/null", "pipe:[7]", "pipe:[8]"],
    }
    return runcstate.parse(json.dumps(data).encode(), "/run/runc/ns/c1/state.json")


def options(**chosen: Any) -> rpc.CriuOpts:
    return request.dump_options(state(), request.DumpOptions(**chosen))


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([], "/etc/criu/runc.conf"),
        (["org.criu.config="], None),
        (["org.criu.config=/b/criu.conf", "bundle=/b"], "/b/criu.conf"),
    ],
)
def test_the_configuration_file_is_the_one_runc_would_name(
    labels: list[str], expected: str | None
) -> None:
    of = state(labels=labels)
    assert request.default_config_file(of) == expected
    assert request.dump_options(of, request.DumpOptions()).config_file == expected
    ours = request.DumpOptions(config_file="/ours.conf")
    assert request.dump_options(of, ours).config_file == "/ours.conf"


def test_every_choice_reaches_its_field() -> None:
    chosen = options(
        leave_running=True,
        tcp_established=True,
        ext_unix_sk=True,
        terminal=True,
        file_locks=True,
        empty_namespaces=("network",),
        cgroups_mode="strict",
        link_remap=True,
        ghost_limit=1 << 30,
        tcp_close=True,
        tcp_skip_in_flight=True,
        timeout=600,
    )
    assert chosen.leave_running
    assert chosen.tcp_established
    assert chosen.ext_unix_sk
    assert chosen.shell_job
    assert chosen.file_locks
    assert chosen.empty_ns == 0x40000000
    assert chosen.manage_cgroups_mode == rpc.CG_STRICT
    assert chosen.link_remap
    assert chosen.ghost_limit == 1 << 30
    assert chosen.tcp_close
    assert chosen.tcp_skip_in_flight
    assert chosen.timeout == 600
    assert (chosen.pid, chosen.freeze_cgroup) == (os.getpid(), "/sys/fs/cgroup/c1")


def test_what_was_not_chosen_is_left_to_criu() -> None:
    chosen = options()
    assert chosen.timeout is None
    assert chosen.ghost_limit is None
    assert chosen.tcp_close is None
    assert chosen.manage_cgroups_mode == rpc.CG_DEFAULT


@pytest.mark.parametrize(
    ("chosen", "complaint"),
    [
        ({"empty_namespaces": ("pid",)}, 'only "network" can be left empty'),
        ({"cgroups_mode": "none"}, "expected soft, full, strict or ignore"),
    ],
)
def test_choices_that_are_none(chosen: dict[str, Any], complaint: str) -> None:
    with pytest.raises(request.RequestError, match=complaint):
        options(**chosen)


def test_a_joined_namespace_that_is_gone() -> None:
    of = state(namespaces=[{"type": "NEWNET", "path": "/proc/0/ns/net"}])
    with pytest.raises(request.RequestError, match="joined the net namespace /proc/0/ns/net"):
        request.dump_options(of, request.DumpOptions())


def test_masked_files_are_external_masked_directories_are_not() -> None:
    of = state(mask_paths=["/proc/keys", "/proc/acpi-is-not-here", "/proc/self"])
    external = request.dump_options(of, request.DumpOptions()).ext_mnt
    assert rpc.ExtMountMap(key="/proc/keys", val="/dev/null") in external
    assert not [m for m in external if m.key in ("/proc/acpi-is-not-here", "/proc/self")]


def test_descriptors_are_as_runc_recorded_them(tmp_path: Path) -> None:
    request.write_descriptors(state(), str(tmp_path))
    file = tmp_path / "descriptors.json"
    assert file.read_text() == '["/dev/null","pipe:[7]","pipe:[8]"]'
    assert file.stat().st_mode & 0o777 == 0o600
    unrecorded = state()
    unrecorded.external_descriptors = None
    request.write_descriptors(unrecorded, str(tmp_path))
    assert file.read_text() == "null"
