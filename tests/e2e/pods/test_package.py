"""The Debian package, the tree and the node installer, each on clean nodes: afterwards a pod runs
under grit with no further step, and when they are gone, all is what it was."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.e2e import gpu
from tests.e2e.pods import agent
from tests.e2e.pods import kubelet as kubelets
from tests.e2e.pods.conftest import CGROUP
from tests.e2e.pods.kubelet import Kubelet
from tests.nodes.installed import REPOSITORY
from tests.nodes.node import CONFIG, Node

if TYPE_CHECKING:
    from collections.abc import Iterator

WATCHED = ("/usr", "/etc", "/opt", "/root", "/var/cache")
NOTES = {"grit.dev/checkpoint": "/var/lib/grit/train"}


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make package` makes."""
    dist = tmp_path_factory.mktemp("dist")
    words = [sys.executable, str(REPOSITORY / "packaging/package.py"), str(dist)]
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    return dist


@pytest.fixture(params=["12", "13", "forky"])
def node(request: pytest.FixtureRequest, built: Path) -> Iterator[Node]:
    """A clean node with a configuration of its administrator's, and what was built in /tmp."""
    binds = gpu.kit_binds()
    with Node(request.param, cgroup=CGROUP, binds=binds) as node:
        config = kubelets.configure(node, runtimes=False)
        node.path(CONFIG).write_text(config.rstrip("\n"))  # as editors may leave it
        for file in built.iterdir():
            shutil.copy(file, node.path("/tmp"))
        yield node


def files(node: Node) -> dict[str, str]:
    """Every file in the watched directories, with the text of what is in /etc."""
    found = {}
    for top in WATCHED:
        for path in node.path(top).rglob("*"):
            if path.is_symlink() or path.is_file():
                name = "/" + str(path.relative_to(node.path("/")))
                in_etc = name.startswith("/etc/containerd")
                found[name] = path.read_text() if in_etc else ""
    return found


def a_pod_runs(node: Node) -> None:
    """Under grit, with its GPU; and where there is a CRIU, saved and restored."""
    node.start_containerd(env=gpu.NO_GPU_CHECK)
    kubelet = Kubelet(node, gpu.gpu_of(node))
    assert kubelet.runs(), node.containerd_log()[-3000:]
    kubelet.import_images()
    one = kubelet.gpu_pod("train").run()
    before = one.next_report()
    assert "containerd-shim-grit-v1" in str(node.processes())
    stock = kubelet.pod("plain", {"main": ["/bin/sleep", "100"]}, handler="").run()
    assert stock.status("main").state == kubelets.RUNNING
    if node.name != "12":
        agent.checkpoint_pod(one, "/var/lib/grit/train")
        manifest = node.path("/var/lib/grit/train/main/checkpoint/grit.json").read_text()
        assert '"xxh3_128"' in manifest  # the system's xxhash is found
        one.remove()
        again = kubelet.gpu_pod("train", annotations=NOTES).run()
        gpu.go_on(before, again.next_report())
        again.remove()
    one.remove()
    stock.remove()
    kubelet.cri.close()
    node.stop_containerd()


def left(before: dict[str, str], after: dict[str, str]) -> set[str]:
    """What is there more, less or changed, but for the logs and lists of the system's own."""
    own = ("/var/cache/", "/usr/lib/x86_64-linux-gnu/lib", "/usr/share/doc/libc")
    differs = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    return {name for name in differs if not name.startswith(own)}


def test_debian_package(node: Node, built: Path) -> None:
    (deb,) = built.glob("*.deb")
    before = files(node)
    node.run(["dpkg", "--install", f"/tmp/{deb.name}"])
    a_pod_runs(node)
    node.run(["dpkg", "--install", f"/tmp/{deb.name}"])  # an upgrade
    node.run(["dpkg", "--purge", "containerd-shim-grit"])
    assert left(before, files(node)) == set()


def test_node_installer(node: Node, built: Path) -> None:
    """The steps of its image, run on the node by the shell that the image has."""
    (tar,) = built.glob("*.tar.gz")
    script = REPOSITORY / "packaging/installer/installer"
    shutil.copy(script, node.path("/tmp/installer"))
    env = {"NODE": "/", "ARCHIVE": f"/tmp/{tar.name}", "ONCE": "1"}
    before = files(node)
    node.run(["busybox", "sh", "/tmp/installer", "install"], env=env)
    a_pod_runs(node)
    node.run(["busybox", "sh", "/tmp/installer", "install"], env=env)
    node.run(["busybox", "sh", "/tmp/installer", "uninstall"], env=env)
    assert left(before, files(node)) == {"/etc/containerd/grit.toml"}  # the administrator's now


@pytest.mark.skipif(not shutil.which("podman") and not shutil.which("buildah"), reason="no podman")
def test_installer_image_builds(built: Path) -> None:
    tool = "podman" if shutil.which("podman") else "buildah"
    (REPOSITORY / "dist").mkdir(exist_ok=True)
    (tar,) = built.glob("*.tar.gz")
    shutil.copy(tar, REPOSITORY / "dist")
    words = [tool, "build", "-f", "packaging/installer/Containerfile", "."]
    subprocess.run(words, cwd=REPOSITORY, check=True)


def configure(node: Node, action: str, *words: str) -> subprocess.CompletedProcess[str]:
    script = REPOSITORY / "packaging"
    for source in (script / "configure.py", *(script / "containerd").iterdir()):
        target = node.path(f"/tmp/packaging/{source.relative_to(script)}")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)
    return node.run(["python3", "/tmp/packaging/configure.py", action, *words], check=False)


def test_configure_keeps_what_there_was(node: Node) -> None:
    """Beside runtimes of the administrator's own, without a file, and told twice."""
    version = "v3" if node.containerd_version >= (2, 0) else "v2"
    plugin = {"v2": "io.containerd.grpc.v1.cri", "v3": "io.containerd.cri.v1.runtime"}[version]
    mine = f'[plugins."{plugin}".containerd.runtimes.mine]\n  runtime_type = "io.example.mine.v1"\n'
    old = node.path(CONFIG).read_text() + "\n" + mine
    node.path(CONFIG).write_text(old)
    assert "restart containerd" in configure(node, "enable").stdout
    enabled = node.path(CONFIG).read_text()
    assert "has the runtime grit" in configure(node, "enable").stdout
    assert node.path(CONFIG).read_text() == enabled
    dump = tomllib.loads(node.run(["containerd", "config", "dump"]).stdout)
    runtimes = dump["plugins"][plugin]["containerd"]["runtimes"]
    assert {"grit", "mine", "runc"} <= runtimes.keys()
    assert runtimes["grit"]["runtime_type"] == "io.containerd.grit.v1"
    assert dump["plugins"][plugin]["restrict_oom_score_adj"] is True  # the administrator's word
    configure(node, "disable")
    assert node.path(CONFIG).read_text() == old

    node.path(CONFIG).unlink()
    configure(node, "enable")
    assert "runtimes.grit" in node.run(["containerd", "config", "dump"]).stdout
    configure(node, "disable")
    assert not node.path(CONFIG).exists()


def test_configure_refuses_what_containerd_would(node: Node) -> None:
    for text, told in (
        ("version = 2\nnonsense [", "config.toml: "),
        ("version = 1\n", "is of version 1"),
        ("version = 2\nroot = 5\n", "containerd does not take it"),
    ):
        node.path(CONFIG).write_text(text)
        done = configure(node, "enable")
        assert done.returncode == 1
        assert told in done.stderr
        assert node.path(CONFIG).read_text() == text
