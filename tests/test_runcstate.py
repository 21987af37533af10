"""runc's state.json as runc 1.1 and 1.3 write it, on cgroup v1, v2 and hybrid nodes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shim import runcstate


def state_json(**changes: Any) -> dict[str, Any]:
    """Trimmed from a state.json of runc 1.1.15; 1.3 leaves empty keys out instead of null."""
    state: dict[str, Any] = {
        "id": "c1",
        "init_process_pid": 4711,
        "init_process_start": 123456,
        "created": "2026-11-23T23:35:33.592654909Z",
        "config": {
            "no_pivot_root": False,
            "rootfs": "/run/b/rootfs",
            "umask": None,
            "mounts": [
                {
                    "source": "/srv/data",
                    "destination": "/data",
                    "device": "bind",
                    "flags": 4096,
                    "propagation_flags": None,
                    "data": "",
                    "relabel": "",
                    "rec_attr": None,
                    "extensions": 0,
                },
                {"source": "proc", "destination": "/proc", "device": "proc", "flags": 14},
            ],
            "devices": [{"type": 99, "major": 1, "minor": 3, "path": "/dev/null", "uid": 0}],
            "namespaces": [
                {"type": "NEWNET", "path": "/proc/99/ns/net"},
                {"type": "NEWPID", "path": ""},
            ],
            "mask_paths": ["/proc/acpi", "/proc/keys"],
            "labels": ["org.criu.config=/b/x=y.conf", "bundle=/run/b"],
        },
        "rootless": False,
        "cgroup_paths": {"": "/sys/fs/cgroup/default/c1"},
        "namespace_paths": {"NEWNET": "/proc/4711/ns/net"},
        "external_descriptors": ["/dev/null", "pipe:[77]", "pipe:[78]"],
        "intel_rdt_path": "",
    }
    state.update(changes)
    return state


def write(root: Path, state: Any) -> None:
    directory = root / "k8s.io" / "c1"
    directory.mkdir(parents=True)
    text = state if isinstance(state, str) else json.dumps(state)
    (directory / "state.json").write_text(text)


def load(root: Path, state: Any) -> runcstate.RunState:
    write(root, state)
    return runcstate.load(str(root), "k8s.io", "c1")


def test_the_fields(tmp_path: Path) -> None:
    state = load(tmp_path, state_json())
    assert state.id == "c1"
    assert (state.init_process_pid, state.init_process_start) == (4711, 123456)
    assert state.rootfs == "/run/b/rootfs"
    assert state.directory == str(tmp_path / "k8s.io/c1")
    assert [(m.source, m.destination, m.device) for m in state.mounts] == [
        ("/srv/data", "/data", "bind"),
        ("proc", "/proc", "proc"),
    ]
    assert state.devices == ["/dev/null"]
    assert state.mask_paths == ["/proc/acpi", "/proc/keys"]
    assert state.external_descriptors == ["/dev/null", "pipe:[77]", "pipe:[78]"]
    assert state.namespace_path("NEWNET") == "/proc/99/ns/net"
    assert state.namespace_path("NEWPID") == ""
    assert state.namespace_path("NEWCGROUP") == ""
    assert state.has_namespace("NEWPID")
    assert not state.has_namespace("NEWCGROUP")
    assert state.namespace_paths == {"NEWNET": "/proc/4711/ns/net"}
    # Only the first "=" separates: values may hold more.
    assert state.labels == {"org.criu.config": "/b/x=y.conf", "bundle": "/run/b"}


def test_keys_left_out_are_as_good_as_null(tmp_path: Path) -> None:
    state = state_json()
    for key in ("cgroup_paths", "external_descriptors", "namespace_paths"):
        del state[key]
    for key in ("mounts", "devices", "namespaces", "mask_paths", "labels"):
        state["config"][key] = None
    loaded = load(tmp_path, state)
    assert loaded.external_descriptors is None
    assert loaded.cgroup_paths == {}
    assert loaded.freezer_path is None
    assert loaded.mounts == []
    assert loaded.labels == {}


@pytest.mark.parametrize(
    ("paths", "unified", "freezer"),
    [
        ({"": "/cg/c1"}, True, "/cg/c1"),
        ({"freezer": "/f/c1", "cpu": "/c/c1"}, False, "/f/c1"),
        # A hybrid node: the v1 freezer counts, whatever the v2 tree beside it says.
        ({"": "/u/c1", "freezer": "/f/c1"}, False, "/f/c1"),
        ({"cpu": "/c/c1"}, False, None),
    ],
)
def test_which_freezer_holds_the_container(
    tmp_path: Path, paths: dict[str, str], unified: bool, freezer: str | None
) -> None:
    state = load(tmp_path, state_json(cgroup_paths=paths))
    assert state.unified is unified
    assert state.freezer_path == freezer


def test_a_container_runc_does_not_know(tmp_path: Path) -> None:
    with pytest.raises(runcstate.StateError, match=r"container c1: runc has no state at .*c1/"):
        runcstate.load(str(tmp_path), "k8s.io", "c1")


@pytest.mark.parametrize(
    ("state", "complaint"),
    [
        ("{", "is not JSON"),
        ("[]", "the file is not an object"),
        (state_json(init_process_pid=None), "has no init_process_pid"),
        (state_json(init_process_pid="1"), "init_process_pid is str, expected int"),
        (state_json(init_process_pid=0), "records no init process"),
        (state_json(config=None), "has no config"),
        (state_json(config={"mounts": []}), r"has no config\.rootfs"),
        (
            state_json(config={"rootfs": "/r", "mounts": [{"source": "/a"}, {"source": 5}]}),
            r"config\.mounts\[1\]\.source is int, expected str",
        ),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, state: Any, complaint: str) -> None:
    with pytest.raises(runcstate.StateError, match=complaint):
        load(tmp_path, state)
