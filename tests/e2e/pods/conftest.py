"""Nodes with CRI, a pod network, a simulated GPU, and a kubelet's part played on them.

`kubelet` is on each node in turn, `kubelet_12` and the like on one; all live as long as the
session. `pod` makes pods there and watches that nothing is left of them at the test's end.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.e2e import gpu
from tests.e2e.pods import kubelet as kubelets
from tests.e2e.pods.kubelet import Kubelet
from tests.nodes.installed import OLD, installed_node, refresh

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.e2e.pods.kubelet import Pod

# Pods have CPU shares; where the host keeps that controller in v1, so must the node.
CGROUP = "v1" if ":cpu:" in Path("/proc/self/cgroup").read_text().replace(",", ":") else "v2"


@contextlib.contextmanager
def kubelet_on(name: str, *, subnet: int = 1, **options: Any) -> Iterator[Kubelet]:
    """A node with the shim installed, containerd with CRI running, one simulated GPU of 64 MiB."""
    options = {"cgroup": CGROUP, "binds": gpu.kit_binds(), **options}
    env = {**gpu.ENVIRONMENT_OF_GRIT, **options.pop("env", {})}
    with installed_node(name, **options) as node:
        refresh(node)
        node.start_containerd(kubelets.configure(node, subnet=subnet), env=env)
        kubelet = Kubelet(node, gpu.gpu_of(node, capacity=64 << 20))
        assert kubelet.runs(), node.containerd_log()[-4000:]
        kubelet.import_images()
        yield kubelet
        kubelet.cri.close()


@pytest.fixture(scope="session")
def kubelet_12() -> Iterator[Kubelet]:
    """containerd 1.6: pods run there, its CRIU does not."""
    with kubelet_on("12") as kubelet:
        yield kubelet


@pytest.fixture(scope="session")
def kubelet_16() -> Iterator[Kubelet]:
    """containerd 1.6 with CRIU 4.1. It does not heed `runtime_path`: the shims that it starts by
    the stock shim's name are grit, too."""
    with kubelet_on(OLD) as kubelet:
        gpu.grit_as_runc(kubelet.node)
        yield kubelet


@pytest.fixture(scope="session")
def kubelet_13() -> Iterator[Kubelet]:
    """containerd 1.7, CRIU 4.1."""
    with kubelet_on("13") as kubelet:
        yield kubelet


@pytest.fixture(scope="session")
def kubelet_forky() -> Iterator[Kubelet]:
    """containerd 2.1, CRIU 4.2."""
    with kubelet_on("forky") as kubelet:
        yield kubelet


def _any(request: pytest.FixtureRequest) -> Kubelet:
    kubelet: Kubelet = request.getfixturevalue(f"kubelet_{request.param.replace('.', '')}")
    return kubelet


@pytest.fixture(params=["12", "13", "forky"])
def any_kubelet(request: pytest.FixtureRequest) -> Kubelet:
    """On each node, also where no CRIU runs."""
    return _any(request)


@pytest.fixture(params=["13", "forky"])
def kubelet(request: pytest.FixtureRequest) -> Kubelet:
    """On each node that can checkpoint."""
    return _any(request)


@pytest.fixture
def clean() -> Iterator[Callable[[Kubelet], Kubelet]]:
    """Notes what a node holds; at the test's end its pods are removed and it must hold the same."""
    noted = []

    def note(kubelet: Kubelet) -> Kubelet:
        noted.append((kubelet, kubelet.node.leaks()))
        return kubelet

    yield note
    for kubelet, before in noted:
        leave_nothing(kubelet, before)


@pytest.fixture
def pod(clean: Callable[[Kubelet], Kubelet], request: pytest.FixtureRequest) -> Callable[..., Pod]:
    """Makes pods on the test's node: `pod("name", {"main": [...]})`; GPU pods by
    `pod("name", "main", "side")`. They are not run yet."""
    names = [name for name in request.fixturenames if name in ("any_kubelet", "kubelet")]
    place = clean(request.getfixturevalue(names[0]))

    def make(name: str, *containers: Any, **options: Any) -> Pod:
        if containers and isinstance(containers[0], dict):
            return place.pod(name, containers[0], **options)
        return place.gpu_pod(name, *containers, **options)

    return make


def leave_nothing(kubelet: Kubelet, before: Any) -> None:
    """Removes every pod of the node; nothing may be left of them: no process, mount, socket,
    directory, control group, network namespace, device memory."""
    node, board = kubelet.node, kubelet.board
    assert board
    board.end_faults()
    for one in kubelet.made:
        one.remove()
    gone = [one.uid for one in kubelet.made]
    kubelet.made.clear()

    def left() -> list[str]:
        after = node.leaks() - before
        # A control group that was removed was empty. A CRIU that others run on this host at the
        # same time restores the host's whole tree, and with it what it saw of this node's.
        groups = [g for g in after.cgroups if not any(uid in g for uid in gone)]
        kinds = (after.processes, after.mounts, after.sockets, after.directories, groups)
        return [entry for kind in kinds for entry in kind]

    with contextlib.suppress(AssertionError):
        gpu.until("end without leaks", lambda: not left(), 10)
    assert not left()
    assert board.owners() == {}
    assert kubelet.pods() == []
