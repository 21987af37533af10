"""The example configurations are what the programs they are for accept."""

from __future__ import annotations

import pytest
import yaml

from shim import __version__, config
from tests.nodes.installed import REPOSITORY
from tests.nodes.node import CONFIG, Node

PACKAGING = REPOSITORY / "packaging"


def test_the_example_shows_the_defaults() -> None:
    path = PACKAGING / "grit.toml"
    text = path.read_text()
    assert config.parse(text, str(path)) == (config.RuncOptions(), config.GritOptions())
    # what is commented out is right as well: every setting there is, at its default
    lines = [line.removeprefix("# ") for line in text.splitlines() if " = " in line]
    top, grit = lines[:2], lines[2:]
    runc_options, options = config.parse("\n".join([*top, "[grit]", *grit]), str(path))
    assert (runc_options, options) == (config.RuncOptions(), config.GritOptions())
    assert {line.split(" =")[0] for line in grit} == set(config.GritOptions.__annotations__)


@pytest.mark.parametrize(
    ("name", "drop_in"),
    [("12", "v2"), ("13", "v2"), ("forky", "v2"), ("forky", "v3")],
)
def test_containerd_takes_the_drop_in(name: str, drop_in: str) -> None:
    with Node(name) as node:
        node.path("/etc/containerd/conf.d").mkdir(parents=True)
        text = (PACKAGING / f"containerd/config-{drop_in}.toml").read_text()
        node.path("/etc/containerd/conf.d/grit.toml").write_text(text)
        version = drop_in.removeprefix("v")
        node.path(CONFIG).write_text(
            f'version = {version}\nimports = ["/etc/containerd/conf.d/*.toml"]\n'
        )
        dump = node.run(["containerd", "--config", CONFIG, "config", "dump"]).stdout
    assert "containerd.runtimes.grit" in dump
    assert "io.containerd.grit.v1" in dump
    assert "/etc/containerd/grit.toml" in dump
    assert "containerd.runtimes.runc" in dump  # added, not in place of the stock one


def test_manifests_belong_together() -> None:
    """One version, one label, one name of the runtime, in all that a cluster is given."""
    runtime_class = yaml.safe_load((PACKAGING / "kubernetes/runtimeclass.yaml").read_text())
    assert runtime_class["apiVersion"] == "node.k8s.io/v1"
    assert (
        f"runtimes.{runtime_class['handler']}]"
        in (PACKAGING / "containerd/config-v3.toml").read_text()
    )
    daemon_set = yaml.safe_load((PACKAGING / "kubernetes/node-installer.yaml").read_text())
    pod = daemon_set["spec"]["template"]
    labels = daemon_set["spec"]["selector"]["matchLabels"]
    assert labels.items() <= pod["metadata"]["labels"].items()
    assert pod["spec"]["nodeSelector"] == runtime_class["scheduling"]["nodeSelector"]
    (container,) = pod["spec"]["containers"]
    volumes = {volume["name"] for volume in pod["spec"]["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    containerfile = (PACKAGING / "installer/Containerfile").read_text()
    assert container["image"].endswith(f":{__version__}")
    assert f"containerd-shim-grit-{__version__}.tar.gz" in containerfile
    assert container["image"] in containerfile
    assert f"grit_{__version__}_all.deb" in (REPOSITORY / "docs/kubernetes.md").read_text()
