"""What a container does under the stock shim it does under ours: every scenario is played under
both, side by side, and the outcomes compared."""

from __future__ import annotations

import json
import subprocess
from typing import TYPE_CHECKING

from shim import messages
from shim.protowire import Message, message, string
from tests.e2e.gpu import until
from tests.e2e.plain.sides import BUNDLES, Events, Side, Terminal, compare, group

if TYPE_CHECKING:
    from tests.nodes.node import Node


def test_run_in_the_foreground(node: Node) -> None:
    shared = node.path("/srv/shared")
    shared.mkdir(exist_ok=True)
    (shared / "file").write_text("from the node\n")
    flags = [
        "--rm",
        "--env=COLOUR=green",
        "--cwd=/tmp",
        "--mount=type=bind,src=/srv/shared,dst=/shared,options=rbind:ro",
        "--net-host",
        "--read-only",
    ]
    script = (
        "read word; echo $word; cat /shared/file; echo $COLOUR; pwd; ls /sys/class/net;"
        "echo wrong >&2; exit 42"
    )

    def scenario(side: Side) -> object:
        return [
            side.run("sh", "-c", script, flags=flags, input="typed\n"),
            side.ctr("container", "ls", "-q"),
            side.run("sh", "-c", "kill -9 $$", flags=["--rm"]),
            side.run("true"),
            side.ctr("task", "ls"),
        ]

    compare(node, scenario, ["grit", "path"])


def test_run_that_cannot_start(node: Node) -> None:
    def scenario(side: Side) -> object:
        outcomes = []
        for command, flags in (
            (["/no/such/program"], []),
            (["true"], ["--cwd=/bin/busybox"]),
            (["true"], ["--mount=type=bind,src=/no/such,dst=/x,options=rbind"]),
        ):
            outcomes.append(side.run(*command, flags=["--rm", *flags]))
            assert outcomes[-1][0] != 0
        return outcomes

    compare(node, scenario)


def test_terminal(node: Node) -> None:
    script = "stty size; tty; read word; echo got $word; exit 5"

    def scenario(side: Side) -> object:
        run = Terminal(node, "ctr", *side.run_words("sh", "-c", script, flags=["--rm", "-t"]))
        run.read_until("/dev/pts")
        run.type("this\n")
        run.read_until("got this")
        ended = run.close()
        side.start()
        words = ["task", "exec", "-t", "--exec-id", "tty", side.name, "sh", "-c", script]
        shell = Terminal(node, "ctr", *words)
        shell.read_until("/dev/pts")
        shell.type("that\n")
        shell.read_until("got that")
        # ctr itself may complain that it was too late to set the terminal's size.
        return [text.partition("\x1b")[0] for text in (run.text, shell.text)], ended, shell.close()

    compare(node, scenario)


def test_attach(node: Node) -> None:
    talk = ["sh", "-c", "while read word; do echo got $word; test $word = end && exit 9; done"]

    def scenario(side: Side) -> object:
        side.start(*talk)
        pipe = subprocess.PIPE
        attached = node.popen(["ctr", "task", "attach", side.name], stdin=pipe, stdout=pipe)
        assert attached.stdin and attached.stdout
        attached.stdin.write("one\n")
        attached.stdin.flush()
        said = [attached.stdout.readline()]
        attached.stdin.write("end\n")
        attached.stdin.flush()
        said.append(attached.stdout.read())
        ended = attached.wait(20)
        side.end()

        assert Terminal(node, "ctr", *side.run_words(*talk, flags=["-d", "-t"])).close() == 0
        terminal = Terminal(node, "ctr", "task", "attach", side.name)
        terminal.type("two\n")
        terminal.read_until("got two")
        terminal.type("end\n")
        terminal.read_until("got end")
        return said, ended, terminal.close()

    compare(node, scenario)


def test_logs_to_a_file_and_to_a_program(node: Node) -> None:
    logger = node.path("/usr/local/bin/logger")
    logger.write_text(
        "#!/bin/sh\n"
        "trap '' TERM\n"  # the shim's word that the output has ended
        'echo "$CONTAINER_ID $CONTAINER_NAMESPACE $*" > /tmp/log.args\n'
        "cat <&3 5>&- > /tmp/log.out &\n"
        "cat <&4 5>&- > /tmp/log.err &\n"
        "exec 5>&-\n"
        "wait\n"
        "echo done > /tmp/log.done\n"
    )
    logger.chmod(0o755)
    script = "i=0; while [ $i -lt 2000 ]; do echo line $i; echo error $i >&2; i=$((i+1)); done"

    def scenario(side: Side) -> object:
        for old in node.path("/tmp").glob("log.*"):
            old.unlink()
        to_file = side.run("sh", "-c", script, flags=["--rm", "--log-uri=file:///tmp/log.file"])
        uri = "--log-uri=binary:///usr/local/bin/logger?key=value"
        to_program = side.run("sh", "-c", script, flags=["--rm", uri])
        ended = node.path("/tmp/log.done")  # which is there before anything is in it
        until("the logger's end", lambda: ended.exists() and ended.read_text() == "done\n")
        texts = {path.name: path.read_text() for path in node.path("/tmp").glob("log.*")}
        texts["log.file"] = "".join(sorted(texts["log.file"].splitlines(True)))
        assert texts["log.out"].endswith("line 1999\n")
        return to_file, to_program, texts

    compare(node, scenario)


def test_signals(node: Node) -> None:
    def scenario(side: Side) -> object:
        outcomes: list[object] = [side.kill(), side.kill("--signal", "SIGBOGUS")]
        side.start()
        outcomes += [side.kill("--exec-id", "nobody"), side.kill("--signal", "0")]
        outcomes += [side.kill(), side.until_stopped(), side.kill()]
        outcomes += [side.ctr("task", "delete", side.name), side.ctr("container", "rm", side.name)]
        side.start("sh", "-c", "trap '' TERM; sleep 1000")
        outcomes += [side.kill(), side.status(), side.kill("--all", "--signal", "SIGKILL")]
        outcomes += [side.until_stopped(), side.ctr("task", "rm", side.name)]
        return outcomes

    compare(node, scenario)


def test_delete(node: Node) -> None:
    def scenario(side: Side) -> object:
        outcomes: list[object] = [side.ctr("task", "delete", side.name)]
        side.start()
        outcomes += [side.ctr("task", "delete", side.name), side.ctr("container", "rm", side.name)]
        outcomes += [side.status(), side.ctr("task", "delete", "--force", side.name)]
        outcomes += [side.status(), side.ctr("task", "start", "-d", side.name), side.status()]
        outcomes += [
            side.ctr("task", "rm", "-f", side.name),
            side.ctr("container", "rm", side.name),
        ]
        return outcomes

    compare(node, scenario)


def test_pause_and_resume(node: Node) -> None:
    def scenario(side: Side) -> object:
        outcomes: list[object] = [side.ctr("task", "pause", side.name)]
        side.start()
        outcomes.append(side.ctr("task", "resume", side.name))
        for _ in range(2):
            outcomes += [side.ctr("task", "pause", side.name), side.status()]
        outcomes += [side.exec("true"), side.ctr("task", "delete", side.name)]
        for _ in range(2):
            outcomes += [side.ctr("task", "resume", side.name), side.status()]
        outcomes += [side.exec("true"), side.ctr("task", "pause", side.name)]
        outcomes.append(side.kill("--signal", "SIGKILL"))
        until("the task's end", lambda: side.status() == "STOPPED")
        outcomes += [side.ctr("task", "pause", side.name), side.ctr("task", "resume", side.name)]
        return outcomes

    compare(node, scenario)


def test_metrics_and_ps(node: Node) -> None:
    def scenario(side: Side) -> object:
        side.start(flags=["--memory-limit", str(64 << 20)])
        code, text, errors = side.ctr("task", "metrics", "--format", "json", side.name)
        metrics = json.loads(text)
        assert metrics["pids"]["current"] > 0
        assert metrics["memory"]["usage"]["limit"] == 64 << 20
        listing = side.ctr("task", "ps", side.name)
        assert str(side.pid()) in listing[1].split()
        return code, errors, sorted(metrics), listing[0], listing[2], listing[1].splitlines()[0]

    compare(node, scenario)


def test_events(node: Node) -> None:
    """In a group with a container that stays: a stock shim that goes with its last container may
    go before it has sent the last event."""

    def scenario(side: Side) -> object:
        keeper = Side(node, side.runtime, "keeper").start(flags=[group("pod")])
        events = Events(node)
        try:
            side.start(flags=[group("pod")])
            events.until("/tasks/start")
            side.exec("sh", "-c", "exit 3")
            events.until("/tasks/exit")
            node.ctr("task", "pause", side.name)
            events.until("/tasks/paused")
            node.ctr("task", "resume", side.name)
            events.until("/tasks/resumed")
            side.kill()
            side.until_stopped()
            node.ctr("task", "delete", side.name)
            events.until("/tasks/delete")
            node.ctr("container", "delete", side.name)
            flags = ["--rm", group("pod"), "--memory-limit", str(16 << 20)]
            side.run("sh", "-c", "tail /dev/zero; true", flags=flags)
            events.until("/tasks/oom")
            events.until("/tasks/delete", 2)
        finally:
            events.close()
            keeper.end()
        # When the OOM killer's event comes among the others is nobody's promise.
        oom = {event for event in events.seen if event[0] == "/tasks/oom"}
        return [event for event in events.seen if event not in oom], oom

    compare(node, scenario)


class UpdateTaskRequest(Message):
    id: str = string(1)
    resources: messages.Any | None = message(2, messages.Any)


def test_the_task_service_itself(node: Node) -> None:
    """What ctr has no word for, and what no client should say, asked of the shim's socket."""
    limits = messages.Any(
        type_url="types.containerd.io/opencontainers/runtime-spec/1/LinuxResources",
        value=json.dumps({"pids": {"limit": 77}}).encode(),
    )

    def scenario(side: Side) -> object:
        side.start()
        here = f"{BUNDLES}/{side.name}"
        mine, nobody = messages.TaskRequest(id=side.name), messages.TaskRequest(id="nobody")
        process = messages.ExecRequest(id=side.name, exec_id="nobody")
        outcomes = [
            side.call("Update", UpdateTaskRequest(id=side.name, resources=limits)),
            node.path(f"/sys/fs/cgroup/pids/default/{side.name}/pids.max").read_text(),
            *(
                (method, side.call(method, request))
                for request in (nobody, process)
                for method in ("State", "Kill", "Delete", "Wait", "Start")
            ),
            *(
                (method, side.call(method, nobody))
                for method in ("Pause", "Resume", "Checkpoint", "Stats", "Pids", "Exec", "Update")
            ),
            *(
                (method, side.call(method, mine))
                for method in ("ResizePty", "CloseIO", "Start", "Delete", "Nope")
            ),
            side.call("Create", messages.CreateTaskRequest(id=side.name, bundle=here)),
            side.call("State", mine, service="no.such.Service"),
            side.call("Connect", mine)[0],
            side.call("Pids", mine)[0],
            side.call("Stats", mine)[0],
            *(side.call(method, b"\xff")[0] != 0 for method in ("State", "Create", "Pause")),
        ]
        code, state = side.call("State", mine)
        read = messages.StateResponse.decode(state)
        # A shim that holds a container refuses to go.
        outcomes += [code, read.id, read.bundle, read.status, side.call("Shutdown", mine)]
        outcomes += [side.status()]
        return outcomes

    compare(node, scenario, ["grit", "path"])


def test_exec(node: Node) -> None:
    def scenario(side: Side) -> object:
        return [
            side.exec("true"),
            side.start()
            and side.exec(
                "sh", "-c", "read word; echo $word $PATH; echo no >&2; exit 6", input="x\n"
            ),
            side.exec("/no/such/program"),
            side.ctr("task", "exec", "--cwd", "/tmp", "--exec-id", "e", side.name, "pwd"),
            side.ctr("task", "exec", "--user", "12:34", "--exec-id", "e", side.name, "id"),
            _exec_killed(side),
        ]

    def _exec_killed(side: Side) -> object:
        words = ["ctr", "task", "exec", "--exec-id", "long", side.name]
        command = ["sh", "-c", "trap 'exit 8' TERM; echo ready; while :; do sleep 0.1; done"]
        running = node.popen([*words, *command], stdout=subprocess.PIPE)
        assert running.stdout
        said = running.stdout.readline()
        killed = side.kill("--exec-id", "long", "--signal", "SIGTERM")
        return said, killed, running.stdout.read(), running.wait(20)

    compare(node, scenario)
