"""Mount points resolved inside a root, and the mounts that come from outside a container."""

from __future__ import annotations

from pathlib import Path

import pytest

from shim.criu_bridge.mounts import cgroup_v1_mount_points, hook_mounts, resolve_in_root


@pytest.mark.parametrize(
    ("links", "path", "expected"),
    [
        ({}, "/var/run/x", "/var/run/x"),
        ({}, "var//run/./x/", "/var/run/x"),
        ({"var/run": "/run"}, "/var/run/x", "/run/x"),
        ({"var/run": "../run"}, "/var/run/x", "/run/x"),
        ({"a": "b", "b": "/c/d"}, "/a/e", "/c/d/e"),
        # A link out of the root stays in it.
        ({"etc": "../../../../outside"}, "/etc/x", "/outside/x"),
        ({}, "/a/../../b", "/b"),
        ({}, "/", "/"),
    ],
)
def test_resolve(tmp_path: Path, links: dict[str, str], path: str, expected: str) -> None:
    for name, target in links.items():
        link = tmp_path / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(target)
    assert resolve_in_root(str(tmp_path), path) == expected


def test_a_loop_of_links_ends(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    assert resolve_in_root(str(tmp_path), "/a/x") == "/a/x"


def write_proc(tmp_path: Path, pid: str, mountinfo: str, cgroup: str = "") -> str:
    directory = tmp_path / pid
    directory.mkdir()
    (directory / "mountinfo").write_text(mountinfo)
    (directory / "cgroup").write_text(cgroup)
    return str(tmp_path)


def test_cgroup_v1_binds_are_one_per_hierarchy(tmp_path: Path) -> None:
    proc = write_proc(
        tmp_path,
        "self",
        "1 0 0:1 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
        "2 0 0:2 / /sys/fs/cgroup/systemd rw shared:9 - cgroup cgroup rw,xattr,name=systemd\n"
        "3 0 0:3 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
        "4 0 0:4 / /sys/fs/cgroup/pids rw - cgroup cgroup rw,pids\n"
        "5 0 0:4 / /elsewhere/pids rw - cgroup cgroup rw,pids\n",
        "3:cpu,cpuacct:/\n2:pids:/\n1:name=systemd:/\n0::/\n",
    )
    assert cgroup_v1_mount_points("/sys/fs/cgroup", proc) == [
        "/sys/fs/cgroup/systemd",
        "/sys/fs/cgroup/cpu,cpuacct",
        "/sys/fs/cgroup/pids",
    ]


def test_only_mounts_without_a_whole_file_system_behind_them_come_from_a_hook(
    tmp_path: Path,
) -> None:
    proc = write_proc(
        tmp_path,
        "7",
        # The root is itself a bind from the host's disk, as native snapshots are.
        "10 9 254:0 /snapshots/4/fs / rw - ext4 /dev/vda rw\n"
        "11 10 0:30 / /proc rw - proc proc rw\n"
        "12 11 0:30 /sys /proc/sys ro - proc proc rw\n"
        "13 10 0:31 / /dev rw - tmpfs tmpfs rw\n"
        "14 13 0:31 /null /proc/keys ro - tmpfs tmpfs rw\n"
        "15 10 254:0 /snapshots/4/fs/opt /opt2 rw - ext4 /dev/vda rw\n"
        "16 10 254:0 /usr/lib/libcuda.so.1 /usr/lib/libcuda.so.1 ro - ext4 /dev/vda rw\n"
        "17 13 0:6 /nvidia0 /dev/nvidia0 rw - devtmpfs devtmpfs rw\n"
        "18 11 0:22 /driver/nvidia /proc/driver/a\\040b ro - proc proc rw\n"
        "19 10 254:0 /snapshots/44/fs/x /y rw - ext4 /dev/vda rw\n",
    )
    write_proc(
        tmp_path,
        "self",
        "1 0 254:0 / / rw - ext4 /dev/vda rw\n"
        "2 1 0:6 / /dev rw - devtmpfs devtmpfs rw\n"
        "3 1 254:0 /snapshots /var/lib/snapshots rw - ext4 /dev/vda rw\n",
    )
    assert [(m.destination, m.source) for m in hook_mounts(7, proc)] == [
        ("/usr/lib/libcuda.so.1", "/usr/lib/libcuda.so.1"),
        ("/dev/nvidia0", "/dev/nvidia0"),
        ("/proc/driver/a b", None),
        ("/y", "/snapshots/44/fs/x"),
    ]


def test_a_source_is_found_below_the_mount_that_shows_it(tmp_path: Path) -> None:
    proc = write_proc(
        tmp_path,
        "7",
        "10 9 0:50 / / rw - overlay overlay rw\n11 10 8:1 /lib/a /b rw - ext4 /dev/sda1 rw\n",
    )
    write_proc(
        tmp_path,
        "self",
        "1 0 8:1 /library /wrong rw - ext4 /dev/sda1 rw\n"
        "2 0 8:1 /lib /opt/lib rw - ext4 /dev/sda1 rw\n",
    )
    assert [m.source for m in hook_mounts(7, proc)] == ["/opt/lib/a"]
