"""What is found not to fit, in words; what is not known never counts against a checkpoint."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from shim import devices, fit
from shim.manifest import Manifest

if TYPE_CHECKING:
    import pathlib

HERE = fit.cpu()


def made(**changes: Any) -> Manifest:
    """A manifest as this node would write it, but for `changes`."""
    facts: dict[str, Any] = {
        "container_id": "one",
        "namespace": "k8s.io",
        "image": "",
        "runtime": "",
        "engine": "driver",
        "driver_version": "580.1",
        "gpus": [],
        "criu_version": "4.2",
        "kernel": os.uname().release,
        "hostname": "node-a",
        "options": {},
        "cuda_processes": [{"pid": 1}],
        "phases": {},
        "cpu": HERE,
    }
    return Manifest(**{**facts, **changes})


@pytest.fixture(autouse=True)
def driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "driver_version", lambda: "580.1")


def problems(manifest: Manifest | None, spec: dict[str, Any] | None = None) -> str:
    container: Any = SimpleNamespace(id="one", config=SimpleNamespace(on_mismatch="refuse"))
    with pytest.raises(fit.Mismatch) as refused:
        fit.require(container, spec or {}, "/images", manifest)
    return str(refused.value)


def fits(manifest: Manifest | None, spec: dict[str, Any] | None = None) -> None:
    container: Any = SimpleNamespace(id="one", config=SimpleNamespace(on_mismatch="refuse"))
    fit.require(container, spec or {}, "/images", manifest)


def mount(destination: str, source: str, **more: Any) -> dict[str, Any]:
    return {"destination": destination, "source": source, "type": "bind", **more}


def test_here_fits_here() -> None:
    fits(made())
    fits(None)


def test_cpu() -> None:
    more = {**HERE, "instructions": HERE["instructions"] + " amx_tile avx10", "model": "Newer"}
    told = problems(made(cpu=more))
    assert "lacks amx_tile, avx10, which the processes found on theirs (Newer)" in told
    assert "made on node-a" in told
    fits(made(cpu={**HERE, "instructions": "sse2"}))  # a newer CPU here
    fits(made(cpu={}))  # not known
    assert "made on riscv64, and this is" in problems(made(cpu={**HERE, "architecture": "riscv64"}))


def test_kernel() -> None:
    assert "older than theirs (99.1.0-generic)" in problems(made(kernel="99.1.0-generic"))
    fits(made(kernel="4.18.0"))
    fits(made(kernel="unheard of"))


def test_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    told = problems(made(driver_version="570.2"))
    assert "the NVIDIA driver is 580.1, and they have that of 570.2 mapped" in told
    fits(made(driver_version="570.2", cuda_processes=[]))
    fits(made(driver_version=None))
    monkeypatch.setattr(devices, "driver_version", lambda: None)
    assert "there is no NVIDIA driver" in problems(made())


def test_sources_of_mounts(tmp_path: pathlib.Path) -> None:
    fits(made(), {"mounts": [mount("/data", str(tmp_path)), {"destination": "/p", "type": "proc"}]})
    for kind in ({"type": "bind"}, {"type": "none", "options": ["rbind"]}):
        gone = {"mounts": [mount("/data", str(tmp_path / "gone"), **kind)]}
        assert f"the source {tmp_path}/gone of the mount /data is not there" in problems(None, gone)


def test_all_reasons_at_once_and_what_can_be_done() -> None:
    told = problems(made(kernel="99.1.0", driver_version="1"))
    assert told.count(";") == 1
    assert "Nothing was started" in told
    assert 'on_mismatch = "warn"' in told
