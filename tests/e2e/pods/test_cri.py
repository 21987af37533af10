"""Pods with `runtimeClassName: grit` on a stock containerd, made as a kubelet makes them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.e2e import gpu
from tests.e2e.pods import kubelet as kubelets
from tests.e2e.pods.services import ServiceError

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.e2e.pods.kubelet import Kubelet, Pod

    MakePod = Callable[..., Pod]
    Clean = Callable[[Kubelet], Kubelet]

SHIMS = ("containerd-shim-grit-v1", "containerd-shim-runc-v2")
SLEEP = ["/bin/sleep", "1000"]
HELLO = ["/bin/sh", "-c", "echo hello from $HOSTNAME; exec sleep 1000"]


@pytest.mark.parametrize("handler", ["grit", "grit-inline", "grit-as-runc"])
def test_a_pod_runs(any_kubelet: Kubelet, pod: MakePod, handler: str) -> None:
    one = pod("web", {"main": HELLO, "side": SLEEP}, handler=handler).run()
    gpu.until("the log", lambda: one.log("main"))
    assert one.log("main") == ["hello from web"]
    assert one.ip().startswith("10.88.1.")
    assert one.shell("side", "hostname; ip -4 -o addr show eth0").split()[0] == "web"
    assert one.ip() in one.shell("side", "ip -4 -o addr show eth0")
    assert {one.status(name).state for name in ("main", "side")} == {kubelets.RUNNING}
    one.stop("side")
    status = one.status("side")
    assert (status.state, status.exit_code) == (kubelets.EXITED, 137)
    assert one.status("main").state == kubelets.RUNNING


@pytest.mark.parametrize("handler", ["grit", "grit-inline", "grit-as-runc"])
def test_one_shim_serves_a_pod(any_kubelet: Kubelet, pod: MakePod, handler: str) -> None:
    """One grit and one stock shim for sandbox and containers, gone with the pod, and no others."""
    node = any_kubelet.node
    if handler == "grit-as-runc" and node.containerd_version == (1, 6):
        pytest.skip("containerd 1.6 heeds no runtime_path: see below")

    def shims() -> list[str]:
        return all_shims(any_kubelet)

    one = pod("pair", {"main": SLEEP, "side": SLEEP}, handler=handler).run()
    other = pod("other", {"main": SLEEP}, handler=handler).run()
    assert len(shims()) == 4, node.processes()
    addresses = {
        node.path(f"{kubelets.TASKS}/{identity}/address").read_text()
        for identity in (one.sandbox, *one.ids.values())
        if node.path(f"{kubelets.TASKS}/{identity}/address").exists()
    }
    assert len(addresses) == 1
    other.remove()
    gpu.until("the other's shims' end", lambda: len(shims()) == 2)
    assert one.status("main").state == kubelets.RUNNING


def all_shims(kubelet: Kubelet) -> list[str]:
    """The programs of the shims on the node."""
    lines = kubelet.node.processes().values()
    return [word for words in lines for word in words if word.endswith(SHIMS)]


def test_containerd_1_6_heeds_no_runtime_path(kubelet_12: Kubelet, clean: Clean) -> None:
    """It reads the setting and starts the stock shim all the same (1.6.20)."""
    clean(kubelet_12).pod("stock", {"main": SLEEP}, handler="grit-as-runc").run()
    assert all_shims(kubelet_12) == ["/usr/bin/containerd-shim-runc-v2"]


@pytest.mark.parametrize("handler", ["grit", "grit-as-runc"])
def test_annotations_reach_sandbox_and_containers(
    any_kubelet: Kubelet, pod: MakePod, handler: str
) -> None:
    of_pod = {"grit.dev/checkpoint": "/nowhere", "example.com/other": "kept out"}
    of_main = {"grit.dev/device-map": "GPU-a=GPU-b"}
    one = pod(
        "noted", {"main": SLEEP, "side": SLEEP}, handler=handler, annotations=of_pod,
        of_containers={"main": of_main},
    ).run()  # fmt: skip

    def ours(name: str) -> dict[str, str]:
        notes = one.spec(name)["annotations"]
        assert "example.com/other" not in notes
        return {key: value for key, value in notes.items() if key.startswith("grit.dev/")}

    checkpoint = {"grit.dev/checkpoint": "/nowhere"}
    assert ours("") == checkpoint
    assert ours("main") == {**checkpoint, **of_main}
    assert ours("side") == checkpoint


def test_options_by_path(any_kubelet: Kubelet, pod: MakePod) -> None:
    """What stands in the file named by ConfigPath holds for the next container; a mistake there
    is told to the kubelet with its line."""
    node = any_kubelet.node
    one = pod("opt", {"main": SLEEP, "late": SLEEP}).run_sandbox()
    node.path(gpu.CONFIG).write_text("[grit]\nlock_timout = 3\n")
    try:
        one.create("main")
        with pytest.raises(ServiceError, match=r"grit.toml, line 2: .*did you mean lock_timeout"):
            one.start("main")
    finally:
        node.path(gpu.CONFIG).write_text("")
    one.create("late")
    one.start("late")
    assert one.status("late").state == kubelets.RUNNING
