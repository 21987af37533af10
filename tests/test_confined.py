"""Where checkpoints may lie and whose they may be: no name, link, mount or race leads elsewhere."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from shim import confined, restore
from shim.checkpoint_dir import CheckpointDirError
from shim.config import GritOptions
from shim.container import Restore
from tests.test_checkpoint_dir import published


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root with `pod/main/checkpoint` in it, and `outside` beside it."""
    for name in ("root/pod/main/checkpoint", "outside/main/checkpoint", "rootless"):
        (tmp_path / name).mkdir(parents=True)
    return tmp_path / "root"


def located(path: object, *roots: object, trusted: tuple[int, ...] = ()) -> os.stat_result | None:
    """The directory's status, found again by its identity."""
    found = confined.locate(str(path), [str(root) for root in roots], trusted)
    if found is None:
        return None
    status = os.stat(str(path))
    assert found == (status.st_dev, status.st_ino)
    return status


def refusal(path: object, *roots: object) -> str:
    with pytest.raises(CheckpointDirError) as caught:
        confined.locate(str(path), [str(root) for root in roots], ())
    return str(caught.value)


def test_what_lies_beneath_a_root_is_found(root: Path) -> None:
    assert located(root / "pod/main/checkpoint", root)
    assert located(f"{root}//pod/./main/", "/nowhere", f"{root}/")
    assert located(root, root)
    assert located(root / "none", root) is None
    assert located(root / "pod/none/checkpoint", root) is None


@pytest.mark.parametrize("path", ["outside", "rootless", "", "root/../outside/main/checkpoint"])
def test_what_does_not_is_refused(root: Path, path: str) -> None:
    assert "checkpoint_roots" in refusal(root.parent / path, root)


@pytest.mark.parametrize("path", ["..", "pod/../..", "pod/../../outside", "pod/../../root/pod"])
def test_nothing_leads_upwards_out_of_a_root(root: Path, path: str) -> None:
    assert "leads out of the root" in refusal(f"{root}/{path}", root)


def test_a_relative_path_is_beneath_no_root(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root.parent)
    assert "does not lie beneath" in refusal("root/pod", root)
    assert "does not lie beneath" in refusal(str(root).lstrip("/"), root)


@pytest.mark.parametrize("target", ["../outside", "/proc/self/cwd", "pod", "/"])
def test_symbolic_links_are_not_followed(root: Path, target: str) -> None:
    """Not even those that stay within: who made them may change them."""
    (root / "link").symlink_to(target)
    assert "link is a symbolic link" in refusal(root / "link", root)
    assert "link is a symbolic link" in refusal(root / "link/main", root)
    (root / "pod/main/checkpoint").rmdir()
    (root / "pod/main/checkpoint").symlink_to("../../../outside/main/checkpoint")
    assert "checkpoint is a symbolic link" in refusal(root / "pod/main/checkpoint", root)


def test_a_root_itself_may_be_a_link(root: Path) -> None:
    """It is the administrator's."""
    link = root.parent / "link"
    link.symlink_to("root")
    assert located(link / "pod", link)


def test_a_file_is_no_directory(root: Path) -> None:
    (root / "file").write_text("")
    assert "cannot be opened: Not a directory" in refusal(root / "file", root)


@pytest.mark.parametrize("name", ["", "pod", "pod/main"])
def test_nobody_else_may_own_or_write_the_way(root: Path, name: str) -> None:
    images = root / "pod/main/checkpoint"
    os.chown(root / name, 4711, -1)
    assert "others could put another in its place" in refusal(images, root)
    assert located(images, root, trusted=(4711,))
    os.chown(root / name, 0, -1)
    (root / name).chmod(0o757)
    assert "may be written by others (mode 0757" in refusal(images, root)
    (root / name).chmod(0o1777)  # as /tmp: what is there stays its owner's
    assert located(images, root)


def test_a_mount_beneath_a_root_is_part_of_it(root: Path) -> None:
    """Storage is mounted there; who may mount needs no checkpoint to do harm. In a namespace."""
    program = (
        "import os, sys; from shim import confined; "
        "status = os.stat(sys.argv[1]); found = confined.locate(sys.argv[1], [sys.argv[2]], ()); "
        "assert found == (status.st_dev, status.st_ino) != eval(sys.argv[3]), found"
    )
    before = confined.locate(str(root / "pod"), [str(root)], ())
    words = f"mount -t tmpfs none '{root}/pod' && '{sys.executable}' -c \"$0\" \"$@\""
    subprocess.run(
        ["unshare", "--mount", "sh", "-c", words, program, root / "pod", root, repr(before)],
        cwd=Path(confined.__file__).parents[1],
        check=True,
    )


def test_no_race_leads_out(root: Path) -> None:
    """A directory and a link out of the root change places all the time."""
    right = confined.locate(str(root / "pod/main"), [str(root)], ())
    (root / "trap").symlink_to("../outside")
    libc = ctypes.CDLL(None)
    done = threading.Event()
    turns = 0

    def swap() -> None:
        nonlocal turns
        names = os.fsencode(root / "pod"), os.fsencode(root / "trap")
        while not done.is_set():
            assert libc.renameat2(-100, names[0], -100, names[1], 2) == 0  # RENAME_EXCHANGE
            turns += 1

    thread = threading.Thread(target=swap)
    thread.start()
    outcomes = set()
    try:
        while turns < 2000 or len(outcomes) < 2:
            try:
                outcomes.add(confined.locate(str(root / "pod/main"), [str(root)], ()))
            except CheckpointDirError as error:
                assert "pod is a symbolic link" in str(error) or "main is a" in str(error)
                outcomes.add(None)
    finally:
        done.set()
        thread.join()
    assert outcomes == {right, None}


def test_trusted_users_may_own_checkpoints(tmp_path: Path) -> None:
    """As storage has it that takes root for somebody else (NFS, root_squash)."""
    images = tmp_path / "job/checkpoint"
    images.parent.mkdir()
    published(images)
    (tmp_path / "job/rootfs-diff.tar").write_text("")
    assert confined.untrusted(str(images)) == []
    for path in [tmp_path / "job", images, *images.iterdir(), tmp_path / "job/rootfs-diff.tar"]:
        os.chown(path, 65534, 65534)
    problems = confined.untrusted(str(images))
    assert {one.kind for one in problems} == {"owner"}
    names = {one.name for one in problems}
    assert names == {
        str(images),
        str(images.parent),
        "core-1.img",
        "grit.json",
        "inventory.img",
        "pages-1.img",
        "rootfs-diff.tar",
    }
    assert "or that user one of trusted_uids" in str(problems[0])
    assert confined.untrusted(str(images), (65534,)) == []
    (images / "core-1.img").chmod(0o660)
    (problem,) = confined.untrusted(str(images), (65534,))
    assert (problem.name, problem.kind) == ("core-1.img", "mode")


def test_who_may_write_beside_the_images_is_not_trusted(tmp_path: Path) -> None:
    images = tmp_path / "job/checkpoint"
    images.parent.mkdir()
    published(images)
    (tmp_path / "job").chmod(0o777)
    assert [one.kind for one in confined.untrusted(str(images))] == ["mode"]
    (tmp_path / "job").chmod(0o1777)
    assert confined.untrusted(str(images)) == []
    images.chmod(0o1777)  # here a new name is a new image
    assert [one.kind for one in confined.untrusted(str(images))] == ["mode"]


def test_nothing_is_loaded_for_it_before_it_is_needed() -> None:
    code = "import sys; from shim import restore; print('ctypes' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(confined.__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "False"


def test_images_that_were_replaced_since_they_were_verified_are_not_restored(root: Path) -> None:
    images = root / "pod/main/checkpoint"
    one: Any = SimpleNamespace(id="c1", config=GritOptions(checkpoint_roots=(str(root),)))
    found = Restore(str(images), None, None)
    found.identity = restore._identity(str(images), one.config)
    restore._require_same(one, found)
    images.rename(root / "pod/main/verified")
    images.mkdir()
    with pytest.raises(restore.RestoreError, match="another directory has taken the place"):
        restore._require_same(one, found)
    images.rmdir()
    (root / "pod/main/verified").rename(images)
    restore._require_same(one, found)


def test_nothing_is_looked_for_outside_of_the_roots(root: Path) -> None:
    """Not even the word of GRIT's agent, for which a restore waits."""
    settings = GritOptions(checkpoint_roots=(str(root),), download_timeout=0.1)
    one: Any = SimpleNamespace(id="c1", config=settings)
    notes = {restore.ANNOTATION: str(root.parent / "outside"), restore.GRIT_RESTORE: "saved"}
    with pytest.raises(CheckpointDirError, match="does not lie beneath"):
        restore._annotated(notes, one)
