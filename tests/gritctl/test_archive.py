"""Archives of others that were made to do harm: read to their end, and what is odd is named."""

from __future__ import annotations

import gzip
import io
import tarfile
from pathlib import Path

import pytest

from shim.gritctl import archive
from shim.gritctl.stored import NotACheckpoint


def packed(path: Path, *entries: tarfile.TarInfo) -> Path:
    whole = [tarfile.TarInfo("config.dump"), tarfile.TarInfo("checkpoint/inventory.img")]
    with tarfile.open(path, "w") as tar:
        for info in [*whole, *entries]:
            tar.addfile(info, io.BytesIO(b"{}" if info.size else b""))
    return path


def one(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        (one("../etc/cron.d/x"), "../etc/cron.d/x leads out of the directory"),
        (one("/etc/cron.d/x"), "/etc/cron.d/x leads out"),
        (one("a/../../x"), "../x leads out"),
        (one("x", tarfile.SYMTYPE, "/etc"), "x is a link or a device"),
        (one("x", tarfile.LNKTYPE, "/etc/shadow"), "x is a link or a device"),
        (one("x", tarfile.BLKTYPE), "x is a link or a device"),
    ],
)
def test_what_would_lead_elsewhere_is_told(
    tmp_path: Path, entry: tarfile.TarInfo, said: str
) -> None:
    found = archive.read(str(packed(tmp_path / "a.tar", entry)))
    assert any(line.startswith(said) for line in found.wrong), found.wrong
    assert not found.problem


def test_more_entries_than_any_checkpoint_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive, "_MAX_NAMES", 10_000)
    path = packed(tmp_path / "a.tar", *(one(f"{number}" + "x" * 90) for number in range(100)))
    found = archive.read(str(path))
    assert "it has more than 65 entries, as none has" in found.problem


def test_a_header_of_a_size_that_no_name_has(tmp_path: Path) -> None:
    """A few kB that unpack into a name of 512 MiB."""
    path = packed(tmp_path / "a.tar")
    header = one("x", tarfile.XHDTYPE)
    header.size = 512 << 20
    data = path.read_bytes()[: 2 * 512]
    path.write_bytes(gzip.compress(data + header.tobuf() + bytes(1 << 20)))
    found = archive.read(str(path))
    assert "has an extended header of 536870912 bytes" in found.problem


def test_no_archive_at_all(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"root:x:0:0:root:/root:/bin/bash\n" * 99)
    with pytest.raises(NotACheckpoint, match="neither a checkpoint directory nor a tar archive"):
        archive.read(str(tmp_path / "a"))
