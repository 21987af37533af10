"""Each subcommand's help followed to the letter: its examples are typed as they stand, by somebody
who has a job, a pod and a few checkpoints."""

from __future__ import annotations

import re
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from shim.gritctl.cli import COMMANDS
from tests.e2e import gpu
from tests.e2e.conftest import running
from tests.e2e.gpu import configure
from tests.e2e.test_gritctl_jobs import pod_options
from tests.e2e.test_gritctl_stored import gritctl
from tests.nodes.image import build_image

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.nodes.node import Node

PLACE = "/var/lib/checkpoints"
EXPECTED = {"gritctl restore": "runs, pid", "gritctl doctor": "A checkpoint can work here."}


@pytest.fixture(scope="module")
def station() -> Iterator[Node]:
    """A node with the container `job`, the pod trainer-0 in k8s.io, and checkpoints."""
    env = gpu.ENVIRONMENT_OF_GRIT
    with running("forky", binds=gpu.kit_binds(), env=env) as node:
        gpu.grit_as_runc(node)
        board = gpu.gpu_of(node, capacity=64 << 20)
        configure(node)
        gpu.Job(node, board, "job").run()
        tar = build_image("local/busybox", "1", {})
        shutil.copyfile(tar, node.path("/var/tmp/image.tar"))
        node.ctr("-n", "k8s.io", "image", "import", "--local", "/var/tmp/image.tar")
        flags = [word.replace("train-0", "trainer-0") for word in pod_options("trainer")]
        node.run_container(
            "trainer-id", gpu.IMAGE, "sleep", "1000", flags=["-d", *flags], runtime=gpu.GRIT,
            env={"CONTAINERD_NAMESPACE": "k8s.io"},
        )  # fmt: skip
        yield node


def examples(command: str) -> list[str]:
    """The lines under "Examples:" in a subcommand's help, without their remarks."""
    from shim.gritctl.cli import gritctl as group

    done = CliRunner().invoke(group, [command, "--help"], terminal_width=200)
    assert done.exit_code == 0
    _, _, after = done.output.partition("Example")
    lines = [line.strip() for line in after.split("\n\n")[0].splitlines()[1:]]
    assert lines, done.output
    return [re.split(r"\s{3,}", line)[0] for line in lines]


def stage(node: Node, command: str) -> None:
    """What the examples of `command` speak of; made anew for each."""
    if command in ("ls", "show", "verify", "diff", "compare", "rm", "prune", "restore"):
        if not node.path("/var/tmp/first").exists():
            gritctl(node, "checkpoint", "job", "--to", "/var/tmp/first")
        for place in (f"{PLACE}/job", f"{PLACE}/job-1", f"{PLACE}/job-2", "/mnt/checkpoints/job"):
            shutil.rmtree(node.path(place), ignore_errors=True)
            shutil.copytree(node.path("/var/tmp/first"), node.path(place))
    if command == "completion":
        for path in (
            "/etc/bash_completion.d", "/etc/fish/completions", "/usr/local/share/zsh/site-functions"
        ):  # fmt: skip
            node.run(["mkdir", "-p", path])
    if command == "doctor":
        node.run(["mkdir", "-p", "/mnt/checkpoints"])


def end_job(node: Node, name: str) -> None:
    node.ctr("task", "kill", "--signal", "SIGKILL", name, check=False)
    gpu.until("its end", lambda: f"{name} " not in running_tasks(node))
    node.ctr("task", "delete", name, check=False)
    node.ctr("container", "delete", name, check=False)


def running_tasks(node: Node) -> str:
    lines = node.ctr("task", "ls").stdout.splitlines()
    return "".join(line for line in lines if "STOPPED" not in line)


def test_every_subcommand_is_here() -> None:
    for command in COMMANDS:
        assert all(line.startswith("gritctl ") for line in examples(command))


# In an order in which the job is still there for those who need it.
ORDER = [
    "doctor", "suspend", "resume", "ls", "show", "verify", "diff", "compare", "completion",
    "rm", "prune", "checkpoint", "restore",
]  # fmt: skip
OF_TWO_NODES = ["migrate", "receive"]  # theirs are typed in test_gritctl_migrate.py


@pytest.mark.timeout(300)
def test_the_help_can_be_followed(station: Node) -> None:
    assert sorted(ORDER + OF_TWO_NODES) == sorted(COMMANDS)
    for command in ORDER:
        if command == "checkpoint":
            for name in ("job", "job-1", "job-2", "job-3"):
                shutil.rmtree(station.path(f"{PLACE}/{name}"), ignore_errors=True)
        if command == "restore":
            stage(station, command)
            end_job(station, "job")
        if command == "resume":
            gritctl(station, "suspend", "job", status=0)
        for line in examples(command):
            if command not in ("checkpoint", "restore"):
                stage(station, command)
            if command == "restore" and "&&" in line:
                end_job(station, "job")
            follow(station, line)


def follow(node: Node, line: str) -> None:
    if "gritctl restore" in line:
        end_job(node, "job")
    typed = line.partition(" | ")[0]  # jq is not on every machine
    done: subprocess.CompletedProcess[str] = node.run(
        ["sh", "-c", typed], check=False, timeout=120, cwd="/var/tmp"
    )
    assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    assert done.stderr == "" or "wrote" in done.stderr, done.stderr
    for begins, said in EXPECTED.items():
        if begins in typed and "--json" not in typed:
            assert said in done.stdout


def test_completion(station: Node) -> None:
    """As bash asks for it: subcommands, containers, files."""
    first = station.ctr("container", "ls", "-q").stdout.split()[0]
    for words, expected in (
        ("gritctl ch", "plain,checkpoint"),
        (f"gritctl checkpoint {first[:2]}", f"plain,{first}"),
        ("gritctl show /v", "file,/v"),
    ):
        env = {
            "_GRITCTL_COMPLETE": "bash_complete",
            "COMP_WORDS": words,
            "COMP_CWORD": str(len(words.split()) - 1),
        }
        said = station.run(["gritctl"], env=env).stdout
        assert expected in said.split(), said
    script = station.run(["gritctl", "completion", "bash"]).stdout
    assert "_GRITCTL_COMPLETE=bash_complete" in script
