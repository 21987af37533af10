"""The conversation with CRIU, against a CRIU that does what it is told (fake_criu.py)."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from shim.criu_bridge import client, rpc
from shim.criu_bridge.errors import CriuError
from shim.criu_bridge.transport import Cancel, Connection, Service, Swrk
from tests.cuda.waiting import until

ROOT = Path(__file__).parents[2]


class Fake:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.images = directory / "images"
        self.work = directory / "work"
        self.binary = directory / "bin" / "criu"
        for path in (self.images, self.work, self.binary.parent):
            path.mkdir()
        self.binary.write_text(
            f"#!{sys.executable} -S\n"
            f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
            "from tests.criu_bridge import fake_criu; fake_criu.main()\n"
        )
        self.binary.chmod(0o755)

    def criu(self, steps: list[dict[str, Any]], **env: str) -> Swrk:
        return Swrk(
            "criu",
            {
                "PATH": f"{self.binary.parent}:{os.environ['PATH']}",
                "FAKE_CRIU": json.dumps(steps),
                "FAKE_CRIU_SAW": str(self.directory / "saw"),
                **env,
            },
        )

    def dump(
        self, steps: list[dict[str, Any]], *, log: str = "", **options: Any
    ) -> client.DumpResult:
        criu = self.criu(steps, FAKE_CRIU_LOG=log)
        opts = rpc.CriuOpts(pid=os.getpid())
        return client.dump(criu, opts, str(self.images), str(self.work), **options)

    def saw(self) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads((self.directory / "saw").read_text())
        return answer


@pytest.fixture
def fake(tmp_path: Path) -> Fake:
    return Fake(tmp_path)


def test_criu_starts_clean(fake: Fake) -> None:
    inherited = os.open("/dev/zero", os.O_RDONLY)  # ours, and none of CRIU's business
    try:
        result = fake.dump([{"notify": "pre-dump"}, {"notify": "post-dump"}, {"answer": True}])
    finally:
        os.close(inherited)
    saw = fake.saw()
    assert [name for name, _ in result.notifications] == ["pre-dump", "post-dump"]
    assert result.log_path == str(fake.work / "dump.log")
    assert saw["argv"] == ["swrk", "3"]
    # 4: the script that the interpreter reads. What we were given to pass on, we pass on.
    passed_on = {fd for fd in range(5, 1024) if is_inheritable(fd)}
    assert set(saw["fds"]) <= {0, 1, 2, 3, 4} | passed_on
    assert saw["links"] == ["/dev/null"] * 3
    assert saw["session"]
    assert saw["blocked"] == []
    assert signal.SIGXFSZ in saw["ignored"]
    assert saw["images"] == str(fake.images)
    assert saw["replies"] == [["pre-dump", rpc.NOTIFY, True], ["post-dump", rpc.NOTIFY, True]]


def is_inheritable(fd: int) -> bool:
    try:
        return os.get_inheritable(fd)
    except OSError:
        return False


def test_its_output_goes_where_it_is_sent(fake: Fake) -> None:
    output = fake.directory / "output"
    criu = Swrk("/bin/ls", dict(os.environ), str(output))
    with pytest.raises(CriuError, match="exit code 2"):
        client.version(criu)
    assert "swrk" in output.read_text()


def test_one_that_has_ended_before_it_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """How it ended is told, not that nobody listens any more."""

    def ended(self: Connection, data: bytes) -> None:
        os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        send(self, data)

    send = Connection.send
    monkeypatch.setattr(Connection, "send", ended)
    with pytest.raises(CriuError, match=r"ended without an answer \(exit code 1\)") as info:
        client.version(Swrk("/bin/false"))
    assert info.value.died


def test_many_at_once_leave_nothing_behind(fake: Fake) -> None:
    before = len(os.listdir("/proc/self/fd"))
    threads = [
        threading.Thread(target=fake.dump, args=([{"notify": "pre-dump"}, {"answer": True}],))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(os.listdir("/proc/self/fd")) == before
    assert_no_child()


@pytest.mark.parametrize(
    ("step", "ending"),
    [
        ({"exit": 0}, "exit code 0"),
        ({"exit": 3}, "exit code 3"),
        ({"kill": signal.SIGKILL}, "killed by signal 9"),
        ({"kill": signal.SIGSEGV}, "killed by signal 11"),
    ],
)
@pytest.mark.parametrize("before", [[], [{"notify": "pre-dump"}]], ids=["at once", "later"])
def test_an_end_without_an_answer(
    fake: Fake, before: list[dict[str, Any]], step: dict[str, Any], ending: str
) -> None:
    with pytest.raises(CriuError, match=ending) as caught:
        fake.dump([*before, step])
    assert caught.value.died


def test_what_a_killed_criu_leaves_is_ended(fake: Fake) -> None:
    """It has the images open, and would sleep for ever."""
    with pytest.raises(CriuError, match="killed by signal 9"):
        fake.dump([{"leave": True}, {"kill": signal.SIGKILL}])
    left = Path(f"/proc/{fake.saw()['left']}/stat")
    until(lambda: not left.exists() or ") Z " in left.read_text())


def test_connections_a_dead_criu_may_have_broken_are_mentioned(fake: Fake) -> None:
    opts = rpc.CriuOpts(pid=os.getpid(), tcp_established=True)
    with pytest.raises(CriuError, match="TCP connections that were open may have broken"):
        client.dump(fake.criu([{"exit": 1}]), opts, str(fake.images), str(fake.work))


def test_the_first_error_of_the_log_and_its_meaning(fake: Fake) -> None:
    log = "(00.1) Error (criu/sk-inet.c:200): inet: Connected TCP socket, consider\n"
    with pytest.raises(CriuError) as caught:
        fake.dump([{"answer": False}], log=log)
    assert caught.value.first_error == (
        "Error (criu/sk-inet.c:200): inet: Connected TCP socket, consider"
    )
    text = str(caught.value)
    assert text.startswith(
        f"criu swrk could not dump pid {os.getpid()}: Error (criu/sk-inet.c:200)"
    )
    assert "tcp_established" in text
    assert text.endswith(f"log: {fake.work}/dump.log")
    assert not caught.value.died


def test_a_log_of_an_earlier_dump_explains_nothing(fake: Fake) -> None:
    (fake.work / "dump.log").write_text("(00.1) Error (criu/x.c:1): long ago\n")
    with pytest.raises(CriuError, match="exit code 1") as caught:
        client.dump(Swrk("/bin/false"), rpc.CriuOpts(pid=1), str(fake.images), str(fake.work))
    assert "long ago" not in str(caught.value)
    assert caught.value.log_path is None


def test_an_error_number_is_better_than_nothing(fake: Fake) -> None:
    with pytest.raises(CriuError, match="No such process") as caught:
        fake.dump([{"answer": False, "errno": errno.ESRCH}])
    assert caught.value.errno == errno.ESRCH


@pytest.mark.parametrize("raw", ["ff", "0801120a"])
def test_garbage_ends_the_conversation(fake: Fake, raw: str) -> None:
    with pytest.raises(CriuError):
        fake.dump([{"raw": raw}, {"hang": True}], deadline_s=20)
    assert_no_child()


def test_a_refusal_is_passed_on(fake: Fake) -> None:
    with pytest.raises(CriuError, match="refused at post-dump") as caught:
        fake.dump(
            [{"notify": "pre-dump"}, {"notify": "post-dump"}],
            on_notify=lambda name: name != "post-dump",
        )
    assert fake.saw()["replies"][-1] == ["post-dump", rpc.NOTIFY, False]
    assert not caught.value.died


def test_an_exception_in_the_callback_is_a_refusal_and_is_kept(fake: Fake) -> None:
    def callback(name: str) -> bool:
        raise LookupError("not there")

    with pytest.raises(CriuError, match="refused at pre-dump: not there") as caught:
        fake.dump([{"notify": "pre-dump"}], on_notify=callback)
    assert isinstance(caught.value.__cause__, LookupError)


def test_the_deadline_kills_a_criu_that_hangs(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "GRACE_S", 0.1)
    with pytest.raises(CriuError, match=r"the deadline of 0\.5 s passed.*was killed") as caught:
        fake.dump([{"hang": True}], deadline_s=0.5)
    assert caught.value.died
    assert_no_child()


def test_a_container_that_ends_ends_the_dump(fake: Fake) -> None:
    """CRIU would wait for ever for a killed init that waits for the threads CRIU traces."""
    init = subprocess.Popen(["sleep", "1000"])

    def callback(name: str) -> bool:
        init.kill()
        return True

    criu = fake.criu([{"notify": "pre-dump"}, {"hang": True}])
    opts = rpc.CriuOpts(pid=init.pid)
    with pytest.raises(CriuError, match="the container ended during the dump"):
        client.dump(criu, opts, str(fake.images), str(fake.work), on_notify=callback)
    init.wait()
    assert_no_child()


def test_cancel_from_another_thread(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "GRACE_S", 0.1)
    cancel = Cancel()

    def callback(name: str) -> bool:
        threading.Timer(0.05, cancel.cancel).start()
        return True

    with pytest.raises(CriuError, match="cancelled"):
        fake.dump([{"notify": "pre-dump"}, {"hang": True}], on_notify=callback, cancel=cancel)
    cancel.close()
    assert_no_child()


def test_a_cancelled_criu_sees_its_writes_fail_and_answers(fake: Fake) -> None:
    cancel = Cancel()

    def callback(name: str) -> bool:
        cancel.cancel()
        return True

    with pytest.raises(CriuError, match="cancelled") as caught:
        fake.dump([{"write": str(fake.images / "pages-1.img")}], on_notify=callback, cancel=cancel)
    cancel.close()
    assert caught.value.errno == errno.EFBIG
    assert not caught.value.died


def test_a_notification_after_the_stop_is_answered_with_no(fake: Fake) -> None:
    cancel = Cancel()
    asked = []

    def callback(name: str) -> bool:
        asked.append(name)
        cancel.cancel()
        return True

    # The fake gives an answer of its own only where it was refused.
    with pytest.raises(CriuError, match="cancelled") as caught:
        fake.dump(
            [{"notify": "pre-dump"}, {"notify": "network-lock"}],
            on_notify=callback,
            cancel=cancel,
        )
    cancel.close()
    assert asked == ["pre-dump"]
    assert not caught.value.died


@pytest.mark.parametrize(
    ("criu", "words"),
    [
        (Swrk("criu", {"PATH": "/nowhere"}), "no executable criu on PATH /nowhere"),
        (Swrk("/nowhere/criu", {}), "cannot start /nowhere/criu: No such file"),
        (Service("/nowhere/criu.sock"), "cannot connect to the CRIU service at /nowhere"),
    ],
)
def test_no_criu(fake: Fake, criu: Swrk | Service, words: str) -> None:
    with pytest.raises(CriuError, match=words):
        client.version(criu)
    with pytest.raises(CriuError, match=words):
        client.dump(criu, rpc.CriuOpts(pid=1), str(fake.images), str(fake.work))


def test_version_and_features(fake: Fake) -> None:
    version = rpc.CriuResp(
        type=rpc.VERSION,
        success=True,
        version=rpc.Version(major_number=4, minor_number=2),
    )
    assert client.version(fake.criu([{"raw": version.encode().hex()}])) == (4, 2, 0)
    features = rpc.CriuResp(
        type=rpc.FEATURE_CHECK, success=True, features=rpc.CriuFeatures(mem_track=True)
    )
    assert client.check_features(fake.criu([{"raw": features.encode().hex()}])).mem_track
    with pytest.raises(CriuError, match="without a version"):
        client.version(fake.criu([{"raw": features.encode().hex()}]))


def test_importing_the_bridge_stays_cheap() -> None:
    heavy = "asyncio logging dataclasses google json subprocess typing inspect"
    code = (
        "import sys; from shim.criu_bridge import client, request, config, images; "
        f"print([m for m in {heavy.split()!r} if m in sys.modules])"
    )
    ran = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert ran.stdout.strip() == "[]"


@pytest.fixture(autouse=True)
def children_before() -> None:
    """Other tests' nodes may be children of this process, too."""
    _before[:] = children()


_before: list[int] = []


def children() -> list[int]:
    """Zombies among them."""
    found: list[int] = []
    for task in Path("/proc/self/task").iterdir():
        try:
            found += map(int, (task / "children").read_text().split())
        except FileNotFoundError:
            pass  # a thread that has ended
    return found


def assert_no_child() -> None:
    assert set(children()) <= set(_before)
