"""`gritctl migrate` and `gritctl receive` against each other, without containerd: what is sent
while it is written, what an evil peer may send, connections cut at every message, and TLS."""

from __future__ import annotations

import os
import socket
import ssl
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from shim import checkpoint_dir, config, digests, offsets, sealed
from shim.checkpoint_dir import CheckpointDirError, Draft
from shim.config import GritOptions
from shim.gritctl import progress, receive, tls, wire
from shim.gritctl.arrival import Arrival, ArrivalError
from shim.gritctl.interrupts import Interrupts
from shim.gritctl.receive import Receiver
from shim.gritctl.saving import SavingError
from shim.gritctl.sending import InDoubt, Sending
from shim.gritctl.wire import Connection, WireError
from tests.gritctl.certificates import authority, certificate
from tests.test_checkpoint_dir import a_manifest

if TYPE_CHECKING:
    from collections.abc import Iterator

ID = "0123456789abcdef" * 2
NAME = "job"
CERTIFICATE = b"the peer's"
CHUNK = 64 << 10
LARGE = CHUNK * 2 + 12345


def saved(draft: Draft, *, page: bytes = b"p") -> None:
    """Fills a draft as `gritctl checkpoint` would."""
    images = Draft.begin(os.path.join(draft.path, checkpoint_dir.IMAGES))
    Path(images.path, "inventory.img").write_bytes(b"inventory")
    Path(images.path, "empty.img").write_bytes(b"")
    Path(images.path, "pages-1.img").write_bytes(page * LARGE)
    with open(os.path.join(images.path, "lane-1.img"), "wb") as lane:
        lane.truncate(3 * CHUNK)  # zeros are holes in it
        lane.seek(CHUNK + 5)
        lane.write(b"device")
    images.publish(a_manifest())
    for name in (checkpoint_dir.CONFIG_DUMP, checkpoint_dir.SPEC_DUMP):
        Path(draft.path, name).write_text("{}")
    draft.publish_whole()


class Restored:
    """In place of a container that runs."""

    def __init__(self) -> None:
        self.runs = False
        self.failure: Exception | None = None

    def run(self) -> int:
        if self.failure:
            raise self.failure
        self.runs = True
        return 4711

    def take_back(self) -> str:
        self.runs = False
        return "Nothing of it is left"


class Place(Receiver):
    """A receiver without containerd: what restores is `restored`."""

    def __init__(self, directory: Path) -> None:
        self.restored = Restored()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        nothing: Any = None
        super().__init__(nothing, context, str(directory), set(), None, Interrupts(), False)
        self.threads: list[threading.Thread] = []

    def _require(self, facts: dict[str, Any], name: str) -> None: ...

    def _restoring(self, place: str, name: str) -> Any:
        assert checkpoint_dir.verify_sums(place) == []
        return self.restored

    def dialled(self, certificate: bytes = CERTIFICATE) -> Connection:
        ours, theirs = socket.socketpair()

        def talk() -> None:
            connection = Connection(theirs)
            try:
                self.talk(connection, certificate, "there")
            except (ArrivalError, WireError) as error:
                receive._answer_failed(connection, error)
            finally:
                connection.close()

        self.threads.append(threading.Thread(target=talk))
        self.threads[-1].start()
        return Connection(ours)

    def begun(self, *, room: int = 0, name: str = NAME) -> Connection:
        control = self.dialled()
        words = dict.fromkeys(("image", "snapshotter", "parent", "key"), "")
        words["checksum"] = digests.SHA256
        control.send("begin", version=wire.VERSION, id=ID, name=name, room=room, **words)
        return control

    def joined(self, certificate: bytes = CERTIFICATE) -> Connection:
        stream = self.dialled(certificate)
        stream.send("join", id=ID)
        return stream

    def sending(
        self, streams: int = 3, seconds: float = 60.0, *, encrypted: bool = False
    ) -> Sending:
        control = self.begun()
        control.expect("ready")
        opened = [self.joined() for _ in range(streams)]
        for one in opened:
            one.expect("ready")
        return Sending(
            control, opened, progress.Display(), NAME, "there", seconds, encrypted=encrypted
        )

    def end(self) -> None:
        for thread in self.threads:
            thread.join(30)
            assert not thread.is_alive()


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "CHUNK", CHUNK)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    (tmp_path / "there").mkdir(mode=0o700)
    found = Place(tmp_path / "there")
    yield found
    found.end()


@pytest.fixture
def source(tmp_path: Path) -> Draft:
    (tmp_path / "here").mkdir()
    return Draft.begin(str(tmp_path / "here/job"))


def idle() -> None: ...


def everything(top: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(top)): (path.stat().st_mode & 0o777, path.read_bytes())
        for path in top.rglob("*")
        if path.is_file()
    }


def nothing_left(place: Place) -> None:
    place.end()
    assert os.listdir(place.directory) == []
    assert not place.restored.runs


def test_a_checkpoint_arrives_whole(place: Place, source: Draft) -> None:
    one = place.sending()
    one.follow(source.path)
    saved(source)
    one.deliver(idle)
    one.close()
    place.end()
    assert place.restored.runs
    arrived = Path(place.directory, NAME)
    assert everything(arrived) == everything(Path(source.final))
    assert arrived.stat().st_mode & 0o777 == 0o700
    assert {mode for mode, _ in everything(arrived).values()} <= {0o600, 0o644}


class Watched:
    """Who waits for the first chunk of a file to be sent, and counts how often it was read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        self.sent, self.read = threading.Event(), 0
        send, read = Connection.send, offsets.read

        def sending(one: Connection, op: str, data: Any = b"", **facts: Any) -> None:
            send(one, op, data, **facts)
            if op == "chunk" and facts["file"] == f"checkpoint/{name}" and not facts["offset"]:
                self.sent.set()

        def reading(fd: int, buffer: memoryview, at: int) -> int:
            self.read += not at and os.path.basename(os.readlink(f"/proc/self/fd/{fd}")) == name
            return read(fd, buffer, at)

        monkeypatch.setattr(Connection, "send", sending)
        monkeypatch.setattr(offsets, "read", reading)


def begun_images(source: Draft, name: str) -> Draft:
    """With a file that is written past its first chunk."""
    images = Draft.begin(os.path.join(source.path, checkpoint_dir.IMAGES))
    Path(images.path, "inventory.img").write_bytes(b"inventory")
    Path(images.path, name).write_bytes(b"1" * LARGE)
    return images


def arrives(place: Place, source: Draft, images: Draft, one: Sending) -> None:
    images.publish(a_manifest())
    source.publish_whole()
    one.deliver(idle)
    one.close()
    place.end()
    assert everything(Path(place.directory, NAME)) == everything(Path(source.final))


@pytest.mark.parametrize(("name", "encrypted"), [("memory.img", False), ("pages-1.img", True)])
def test_it_is_sent_while_it_is_written_and_what_changed_again(
    place: Place, source: Draft, monkeypatch: pytest.MonkeyPatch, name: str, encrypted: bool
) -> None:
    """The first chunk of a file is changed once it has been sent."""
    watched = Watched(monkeypatch, name)
    one = place.sending(streams=1, encrypted=encrypted)
    images = begun_images(source, name)
    one.follow(source.path)
    assert watched.sent.wait(30), "nothing is sent before it is published"
    with open(os.path.join(images.path, name), "r+b") as file:
        file.seek(10)
        file.write(b"2")
    arrives(place, source, images, one)
    assert one.bytes > LARGE, "the changed chunk goes twice"


@pytest.mark.parametrize("name", ["pages-1.img", "lane-1-0-0.img"])
def test_what_is_written_from_front_to_end_is_read_once(
    place: Place, source: Draft, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    watched = Watched(monkeypatch, name)
    one = place.sending(streams=1)
    images = begun_images(source, name)
    one.follow(source.path)
    assert watched.sent.wait(30)
    arrives(place, source, images, one)
    assert watched.read == 1


def test_a_file_that_took_the_place_of_another_is_sent_anew(
    place: Place, source: Draft, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Device memory is written again where a process took up CUDA meanwhile."""
    watched = Watched(monkeypatch, "lane-1-0-0.img")
    one = place.sending(streams=1)
    images = begun_images(source, "lane-1-0-0.img")
    one.follow(source.path)
    assert watched.sent.wait(30)
    other = Path(images.path, "new")
    other.write_bytes(b"2" * LARGE)
    other.rename(Path(images.path, "lane-1-0-0.img"))
    arrives(place, source, images, one)


def test_holes_are_not_sent(place: Place, source: Draft) -> None:
    saved(source)
    one = place.sending()
    one.follow(source.final)
    one.deliver(idle)
    one.close()
    assert one.bytes < LARGE + 2 * CHUNK


def test_what_differs_from_its_digest_is_not_published(place: Place, source: Draft) -> None:
    saved(source)
    with open(os.path.join(source.final, "checkpoint/pages-1.img"), "r+b") as file:
        file.write(b"X")
    one = place.sending()
    one.follow(source.final)
    with pytest.raises(SavingError, match=r"is damaged: .*pages-1.img: has SHA-256"):
        one.deliver(idle)
    nothing_left(place)


def test_a_file_too_many_is_not_published(place: Place, source: Draft) -> None:
    saved(source)
    Path(source.final, "checkpoint/pages-2.img").write_bytes(b"never dumped")
    one = place.sending()
    one.follow(source.final)
    with pytest.raises(SavingError, match=r"pages-2.img: is not in the manifest"):
        one.deliver(idle)
    nothing_left(place)


def test_what_cannot_be_restored_leaves_nothing(place: Place, source: Draft) -> None:
    place.restored.failure = RuntimeError("no GPU of that type")
    one = place.sending()
    one.follow(source.path)
    saved(source)
    with pytest.raises(SavingError, match="there: no GPU of that type"):
        one.deliver(idle)
    nothing_left(place)


def test_an_interrupted_delivery_leaves_nothing(place: Place, source: Draft) -> None:
    class Stop(Exception):
        pass

    def stop() -> None:
        raise Stop

    release = threading.Event()
    place.restored.run = lambda: int(release.wait(30))  # type: ignore[method-assign]
    one = place.sending()
    one.follow(source.path)
    saved(source)
    with pytest.raises(Stop):
        one.deliver(stop)
    release.set()
    nothing_left(place)


def test_no_room_for_a_file_is_told_at_once(place: Place, source: Draft) -> None:
    """By the stream that meets it; the sender says why and not that a connection was cut."""
    one = place.sending()
    one.follow(source.path)
    (coming,) = place._coming.values()
    coming.arrival._room = 1000
    saved(source)
    with pytest.raises(SavingError, match="there is no room for that"):
        one.deliver(idle)
    nothing_left(place)


# --- cut at every message -----------------------------------------------------------------


def transcript(directory: Path) -> list[tuple[str, dict[str, Any], bytes]]:
    """What a source says on its stream and then, from `commit` on, on its control connection."""
    said: list[tuple[str, dict[str, Any], bytes]] = []
    sizes = {}
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            name, data = str(path.relative_to(directory)), path.read_bytes()
            sizes[name] = len(data)
            for at in range(0, len(data), CHUNK):
                said.append(("chunk", {"file": name, "offset": at}, data[at : at + CHUNK]))
    return [*said, ("sync", {}, b""), ("commit", {"files": sizes}, b""), ("keep", {}, b"")]


ANSWERS = {"sync": ["synced"], "commit": ["stored", "runs"], "keep": ["kept"]}


def play(place: Place, said: list[tuple[str, dict[str, Any], bytes]]) -> None:
    """Says all of it, then cuts both connections."""
    control = place.begun()
    control.expect("ready")
    stream = place.joined()
    stream.expect("ready")
    for op, facts, data in said:
        to = control if op in ("commit", "keep") else stream
        to.send(op, data, **facts)
        for answer in ANSWERS.get(op, []):
            to.expect(answer)
    for one in (stream, control):
        one.cut()
        one.close()


def test_a_connection_cut_at_every_message_leaves_nothing(place: Place, source: Draft) -> None:
    saved(source)
    said = transcript(Path(source.final))
    for number in range(len(said)):
        play(place, said[:number])
        nothing_left(place)
    play(place, said)
    place.end()
    assert place.restored.runs
    assert checkpoint_dir.verify_sums(os.path.join(place.directory, NAME)) == []


def test_a_stream_cut_within_a_message_leaves_nothing(place: Place) -> None:
    control = place.begun()
    control.expect("ready")
    stream = place.joined()
    stream.expect("ready")
    stream._socket.sendall(wire._LENGTHS.pack(20, CHUNK) + b'{"op":')
    stream.close()
    with pytest.raises(wire.PeerFailed, match="was cut"):
        control.expect("stored", wire.within(30))
    control.close()
    nothing_left(place)


def answering(*answers: str) -> tuple[Connection, threading.Thread]:
    """A peer that takes the rest for granted, gives these answers on `commit` and `keep`, and goes
    away."""
    ours, theirs = socket.socketpair()

    def answer() -> None:
        connection = Connection(theirs)
        for words in answers:
            connection.receive()
            for word in words.split():
                connection.send(word)
        connection.close()

    thread = threading.Thread(target=answer)
    thread.start()
    return Connection(ours), thread


@pytest.mark.parametrize(
    ("answers", "error"),
    [([""], SavingError), (["stored"], SavingError), (["stored runs", ""], InDoubt)],
    ids=["no answer", "stored only", "runs only"],
)
def test_the_source_goes_on_until_the_other_runs(
    source: Draft, answers: list[str], error: type[Exception]
) -> None:
    """SavingError has the container resumed; only between `keep` and `kept` it is in doubt."""
    control, thread = answering(*answers)
    one = Sending(control, [], progress.Display(), NAME, "there", 60.0)
    one.follow(source.path)
    with pytest.raises(error, match="there"):
        one.deliver(idle)
    thread.join()


def test_a_destination_that_hangs_is_given_up(source: Draft) -> None:
    ours, theirs = socket.socketpair()
    one = Sending(Connection(ours), [], progress.Display(), NAME, "there", 0.0)
    one.follow(source.path)
    with pytest.raises(SavingError, match="not answered in time"):
        one.deliver(idle)
    theirs.close()


# --- an evil peer -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "", ".", "..", "/etc/passwd", "../job", "checkpoint", "checkpoint/", "checkpoint/..",
        "checkpoint/../config.dump", "checkpoint/a/b", "checkpoint//a", "checkpoint/.hidden",
        "checkpoint/a\0b", "checkpoint/a\nb", "checkpoint/" + "n" * 256, "checkpoint/\ud800",
        "artifacts", "./config.dump", "config.dump/", "checkpoint/checkpoint/a",
    ],
)  # fmt: skip
def test_names_are_confined(tmp_path: Path, name: str) -> None:
    one = Arrival(str(tmp_path / "job"), 0)
    for take in (
        lambda: one.write(name, 0, memoryview(b"evil")),
        lambda: one.leave_hole(name, 0, 1),
        lambda: one.publish({name: 0}),
    ):
        with pytest.raises(ArrivalError, match="is no file of a checkpoint"):
            take()
    one.discard()
    assert list(tmp_path.iterdir()) == []


def test_links_are_not_followed(tmp_path: Path) -> None:
    """Nobody but root could put one there; it is not followed all the same."""
    one = Arrival(str(tmp_path / "job"), 0)
    (tmp_path / "victim").write_text("mine")
    os.symlink(tmp_path / "victim", os.path.join(one._draft.path, "config.dump"))
    with pytest.raises(OSError, match="symbolic links"):
        one.write("config.dump", 0, memoryview(b"evil"))
    one.discard()
    assert (tmp_path / "victim").read_text() == "mine"


def test_more_than_fits_is_refused_before_it_is_written(tmp_path: Path) -> None:
    with pytest.raises(ArrivalError, match="has room for"):
        Arrival(str(tmp_path / "job"), 1 << 60)
    one = Arrival(str(tmp_path / "job"), 0)
    with pytest.raises(ArrivalError, match="no room"):
        one.write("config.dump", 1 << 60, memoryview(b"x"))
    with pytest.raises(ArrivalError, match="no room"):
        one.leave_hole("config.dump", 0, 1 << 60)
    one._room = 10
    one.write("config.dump", 0, memoryview(b"12345678"))
    one.write("config.dump", 0, memoryview(b"12345678"))  # the same once more
    with pytest.raises(ArrivalError, match="no room"):
        one.write("spec.dump", 0, memoryview(b"123"))
    with pytest.raises(ArrivalError, match="not all has come"):
        one.publish({"config.dump": 9})
    with pytest.raises(ArrivalError, match="after the end"):
        one.write("config.dump", 0, memoryview(b"1"))
    one.discard()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("later", ["nothing", "the same", "another"])
def test_a_block_is_digested_when_it_is_whole_and_again_if_it_changes(
    source: Draft, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, later: str
) -> None:
    size = 2 * CHUNK
    monkeypatch.setattr(digests, "BLOCK", size)
    monkeypatch.setattr("shim.manifest.BLOCK", size)
    saved(source)
    one = Arrival(str(tmp_path / "job"), 0, digests.SHA256)
    sizes = {}
    for name, (_, data) in everything(Path(source.final)).items():
        sizes[name] = len(data)
        for at in range(0, len(data), CHUNK):
            one.write(name, at, memoryview(data)[at : at + CHUNK])
    if later != "nothing":
        change = b"p" if later == "the same" else b"X"
        one.write("checkpoint/pages-1.img", 7, memoryview(change))
    taken = []
    of_block = digests.of_block

    def watched(path: str, start: int, *more: Any) -> bytes:
        taken.append((os.path.basename(path), start))
        return of_block(path, start, *more)

    monkeypatch.setattr(digests, "of_block", watched)
    if later == "another":
        with pytest.raises(CheckpointDirError, match=r"is damaged: .*pages-1.img: has SHA-256"):
            one.publish(sizes)
        one.discard()
    else:
        one.publish(sizes)
    assert (("pages-1.img", 0) in taken) == (later != "nothing")
    assert ("pages-1.img", size) in taken, "what is not whole is left to the end"


def test_too_many_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shim.gritctl.arrival._MOST_FILES", 2)
    one = Arrival(str(tmp_path / "job"), 0)
    for number in range(2):
        one.leave_hole(f"checkpoint/{number}", 0, 0)
    with pytest.raises(ArrivalError, match="more than 2 files"):
        one.leave_hole("checkpoint/2", 0, 0)
    one.discard()


def test_what_is_there_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "job").mkdir()
    with pytest.raises(ArrivalError, match="already"):
        Arrival(str(tmp_path / "job"), 0)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../a", "a\0", "-a", "a" * 77, "a\n"])
def test_a_container_has_a_containers_name(place: Place, name: str) -> None:
    control = place.begun(name=name)
    with pytest.raises(wire.PeerFailed, match="no container's name"):
        control.expect("ready")
    control.close()
    nothing_left(place)


def test_no_room_is_told_before_anything_is_done(place: Place) -> None:
    control = place.begun(room=1 << 60)
    with pytest.raises(wire.PeerFailed, match="has room for"):
        control.expect("ready")
    control.close()
    nothing_left(place)


def test_what_cannot_be_decrypted_is_refused_before_anything_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = GritOptions()
    monkeypatch.setattr(config, "load", lambda: ("", settings))  # as it is then
    receive._require_key("")  # it is not encrypted
    with pytest.raises(ArrivalError, match=r"its checkpoint is encrypted.* names none"):
        receive._require_key("abc")
    (tmp_path / "key").write_bytes(b"k" * 32)
    (tmp_path / "key").chmod(0o600)
    settings = GritOptions(encryption_key_file=str(tmp_path / "key"))
    with pytest.raises(ArrivalError, match="the key is abc, and those here are"):
        receive._require_key("abc")
    mine = sealed.key(settings)
    assert mine
    receive._require_key(mine.identity)


def test_another_peer_cannot_join(place: Place) -> None:
    control = place.begun()
    control.expect("ready")
    for shown in (b"another's", b""):
        stream = place.joined(shown)
        with pytest.raises(wire.PeerFailed, match="not under way"):
            stream.expect("ready")
        stream.close()
    control.cut()
    control.close()
    nothing_left(place)


@pytest.mark.parametrize(
    "raw",
    [
        wire._LENGTHS.pack(1 << 31, 0),
        wire._LENGTHS.pack(2, CHUNK + 1) + b"{}",
        wire._LENGTHS.pack(3, 0) + b"{]}",
        wire._LENGTHS.pack(2, 0) + b"[]",
        wire._LENGTHS.pack(200_000, 0) + b"[" * 200_000,
        wire._LENGTHS.pack(16, 0) + b'{"op": "format"}',
        wire._LENGTHS.pack(15, 0) + b'{"op": "chunk"}',
        wire._LENGTHS.pack(54, 0) + b'{"op": "chunk", "file": "config.dump", "offset": -1.5}',
        wire._LENGTHS.pack(52, 0) + b'{"op": "chunk", "file": "config.dump", "offset": -1}',
    ],
    ids=["large", "data", "broken", "list", "deep", "unknown", "empty", "fraction", "negative"],
)
def test_nonsense_on_a_stream_ends_it(place: Place, raw: bytes) -> None:
    control = place.begun()
    control.expect("ready")
    stream = place.joined()
    stream.expect("ready")
    stream._socket.sendall(raw)
    with pytest.raises(wire.PeerFailed):
        control.expect("stored", wire.within(30))
    control.close()
    stream.close()
    nothing_left(place)


# --- TLS ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """node-a and node-b of one authority, `stranger/node-b` of another."""
    top = tmp_path_factory.mktemp("keys")
    authority(top)
    certificate(top, "node-a", "127.0.0.1")
    certificate(top, "node-b", "127.0.0.2")
    authority(top / "stranger")
    certificate(top / "stranger", "node-b")
    return top


def context(keys: Path, name: str, *, server: bool, ca: str = "ca.crt") -> ssl.SSLContext:
    cert, key = f"{keys}/{name}.crt", f"{keys}/{name}.key"
    return tls.context(cert, key, f"{keys}/{ca}", server=server)


def said(keys: Path, client: ssl.SSLContext, peers: set[str], host: str = "127.0.0.1") -> str:
    """What a client with that context meets at node-a; "" where it is let in."""
    nothing: Any = None
    server = context(keys, "node-a", server=True)
    place = Receiver(nothing, server, "/nowhere", peers, None, Interrupts(), False)
    listener = socket.create_server(("127.0.0.1", 0))

    def meet() -> None:
        sock, _ = listener.accept()
        place._meet(sock, "client")

    thread = threading.Thread(target=meet)
    thread.start()
    sock = socket.create_connection(listener.getsockname())
    try:
        connection = Connection(client.wrap_socket(sock, server_hostname=host))
        connection.expect("hello")
        connection.send("join", id=ID)
        connection.expect("ready")
    except (WireError, OSError) as error:
        return str(error)
    finally:
        sock.close()
        thread.join()
        listener.close()
    return ""


LET_IN = "joins what is not under way"


def test_both_ends_show_a_certificate_of_the_authority(keys: Path) -> None:
    client = context(keys, "node-b", server=False)
    assert said(keys, client, set()) == LET_IN
    assert said(keys, client, {"node-b"}) == LET_IN
    assert said(keys, client, {"127.0.0.2", "node-c"}) == LET_IN
    assert "no --peer has the name 127.0.0.2, node-b" in said(keys, client, {"node-a"})


def test_others_are_kept_out(keys: Path) -> None:
    """Others than the wanted server, others than the authority's clients, an older TLS."""
    client = context(keys, "node-b", server=False)
    assert "not valid for '127.0.0.9'" in said(keys, client, set(), "127.0.0.9")
    trusting = context(keys, "stranger/node-b", server=False)
    assert "UNKNOWN_CA" in said(keys, trusting, set())
    distrusting = context(keys, "node-b", server=False, ca="stranger/ca.crt")
    assert "CERTIFICATE_VERIFY_FAILED" in said(keys, distrusting, set())
    nobody = ssl.create_default_context(cafile=str(keys / "ca.crt"))
    assert "CERTIFICATE_REQUIRED" in said(keys, nobody, set())
    old = ssl.create_default_context(cafile=str(keys / "ca.crt"))
    old.load_cert_chain(keys / "node-b.crt", keys / "node-b.key")
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    assert "PROTOCOL_VERSION" in said(keys, old, set())


def test_a_key_that_others_may_read_is_refused(keys: Path) -> None:
    key = keys / "node-b.key"
    mode = key.stat().st_mode
    key.chmod(0o644)
    try:
        with pytest.raises(tls.TlsError, match="chmod go="):
            context(keys, "node-b", server=False)
    finally:
        key.chmod(mode)
