"""Which binary is taken for the stock shim."""

from __future__ import annotations

import shutil
import sys
from typing import TYPE_CHECKING

import pytest

from shim import inner

if TYPE_CHECKING:
    from pathlib import Path


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def stock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The stock shim, last in PATH."""
    monkeypatch.setenv("PATH", f"{tmp_path}/first:{tmp_path}/last")
    return program(tmp_path / "last/containerd-shim-runc-v2", "#!stock")


def test_beside_containerd_before_path(stock: Path, tmp_path: Path) -> None:
    beside = program(tmp_path / "containerd/containerd-shim-runc-v2", "#!stock, of this version")
    assert inner.find(f"{tmp_path}/containerd/containerd") == str(beside)
    assert inner.find() == inner.find("containerd") == str(stock)


@pytest.mark.parametrize("as_what", ["link", "copy"])
def test_grit_under_the_stock_name_is_not_it(
    stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_what: str
) -> None:
    """It would start itself for ever."""
    grit = program(tmp_path / "bin/containerd-shim-grit-v1", "#!grit")
    (tmp_path / "first").mkdir()
    disguise = tmp_path / "first/containerd-shim-runc-v2"
    if as_what == "link":
        disguise.symlink_to(grit)
    else:
        shutil.copy(grit, disguise)
    monkeypatch.setattr(sys, "argv", [str(disguise), "-info"])
    assert inner.find() == str(stock)
    stock.unlink()
    with pytest.raises(inner.InnerError, match=f"{tmp_path}/first"):
        inner.find()
