"""What is fuzzed: for each place at which bytes of others come in, a function that takes any bytes.
It returns where they were understood, or refused as they should be, and raises whatever else came.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import io
import json
import os
import queue
import shutil
import tempfile
import threading
from typing import TYPE_CHECKING

from shim import config, manifest, messages, oci_layer, options
from shim.criu_bridge import contents, errors, images, rpc
from shim.criu_bridge.images import ImageError
from shim.protowire import DecodeError
from shim.ttrpc.connection import ClientConnection, ServerConnection, StreamClosed
from shim.ttrpc.events import DataReceived, RequestReceived
from shim.ttrpc.frames import FrameReader

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Target = Callable[[bytes], None]


SCRATCH = "GRIT_FUZZ_SCRATCH"
"""Names the directory for what is written; the fuzzer ends its process without a farewell."""


def _pieces(data: bytes) -> Iterator[bytes]:
    """The rest of the input, cut where its first bytes say."""
    cuts, rest = data[:4], data[4:]
    for cut in cuts:
        yield rest[:cut]
        rest = rest[cut:]
    yield rest


def frames(data: bytes) -> None:
    """A stream of frames: however it is cut, the same comes out."""
    reader, found = FrameReader(), []
    for piece in _pieces(data):
        found += reader.feed(piece)
    whole = FrameReader().feed(data[4:])
    assert [_plain(one) for one in found] == [_plain(one) for one in whole]


def _plain(one: object) -> list[object]:
    return [getattr(one, name) for name in type(one).__slots__]  # type: ignore[attr-defined]


def server(data: bytes) -> None:
    """A client that says anything to the server's side; each request is answered."""
    connection = ServerConnection()
    for piece in _pieces(data):
        for event in connection.receive(piece):
            if isinstance(event, RequestReceived):
                with contextlib.suppress(StreamClosed):
                    connection.send_data(event.stream_id, b"x")
                with contextlib.suppress(StreamClosed):
                    connection.respond(event.stream_id, b"y")


def client(data: bytes) -> None:
    """A server that says anything to the client's side, with calls of each kind under way."""
    connection = ClientConnection()
    for _ in range(3):
        connection.request("s", "m", b"")
    for piece in _pieces(data):
        for event in connection.receive(piece):
            assert not isinstance(event, DataReceived) or event.stream_id % 2


def task_options(data: bytes) -> None:
    """A call's options, and what a task's requests hold."""
    with contextlib.suppress(config.ConfigError, ValueError):
        request = messages.CreateTaskRequest.decode(data)
        given = request.options
        if given and messages.RuntimeOptions.decode(given.value).config_path:
            return  # a file of this machine
        options.runc_options(options.read(given)[0])
    with contextlib.suppress(ValueError):
        asked = messages.CheckpointTaskRequest.decode(data)
        options.checkpoint_options(asked.options)
        assert messages.CheckpointTaskRequest.decode(asked.encode()) == asked


def configuration(data: bytes) -> None:
    """grit.toml."""
    with contextlib.suppress(config.ConfigError):
        config.parse(data.decode(errors="replace"), "grit.toml")


def criu(data: bytes) -> None:
    """CRIU's answers, and its log."""
    with contextlib.suppress(DecodeError):
        answer = rpc.CriuResp.decode(data)
        assert rpc.CriuResp.decode(answer.encode()) == answer
    text = data.decode(errors="replace")
    errors.first_error(text)
    errors.explain(text)


def grit_json(data: bytes) -> None:
    """A checkpoint's manifest; what is read is written so that it is read again."""
    try:
        found = manifest.Manifest.decode(data, "grit.json")
    except manifest.ManifestError:
        return
    again = manifest.Manifest.decode(found.encode(), "grit.json")
    assert again == found


_IMAGES = (
    "inventory.img",
    "pstree.img",
    "core-1.img",
    "mm-1.img",
    "pagemap-1.img",
    "pagemap-shmem-12.img",
    "mountpoints-1.img",
    "files.img",
)


def image_files(data: bytes) -> None:
    """A directory of images: the input's parts, each with its length before it."""
    for parse in (images.parse_inventory, images.parse_pstree, images.parse_dump_stats):
        with contextlib.suppress(ImageError):
            parse(data)
    with contextlib.suppress(ImageError):
        images.parse_pagemap(data, [(0, 1 << 40)])
    directory = _image_directory()
    for name in _IMAGES:
        size, data = int.from_bytes(data[:2], "little"), data[2:]
        with open(os.path.join(directory, name), "wb") as file:
            file.write(data[:size])
        data = data[size:]
    with contextlib.suppress(ImageError):
        json.dumps(contents.read(directory).memory())
    with contextlib.suppress(ImageError):
        contents.loopback_connections(directory)


@functools.cache
def _image_directory() -> str:
    return _scratch("images")


def _scratch(name: str) -> str:
    """A directory of this process's own, which goes with it."""
    path = tempfile.mkdtemp(prefix=f"grit-fuzz-{name}-", dir=os.environ.get(SCRATCH))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


class _Layers:
    """A thread whose root directory is a scratch directory, as the unpacking process's is."""

    def __init__(self) -> None:
        self._root = _scratch("root")
        self._in: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._out: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True).start()

    def __call__(self, data: bytes) -> None:
        self._in.put(data)
        error = self._out.get()
        if error is not None:
            raise error

    def _run(self) -> None:
        clone_fs = 0x200
        if ctypes.CDLL(None, use_errno=True).unshare(clone_fs):
            raise OSError(ctypes.get_errno(), "unshare")
        os.chroot(self._root)
        os.chdir("/")
        while True:
            try:
                self._unpack(self._in.get())
                self._out.put(None)
            except BaseException as error:
                self._out.put(error)

    @staticmethod
    def _unpack(data: bytes) -> None:
        os.makedirs("/lower/d", exist_ok=True)
        with open("/lower/f", "w") as file:
            file.write("x")
        with contextlib.suppress(Exception, MemoryError):  # each is told in one line by main()
            layer = oci_layer._decompressed(io.BytesIO(data))
            for notice in oci_layer._unpack(layer, oci_layer._Room(1 << 20, 1000)):
                assert isinstance(notice, str)
        for name in os.listdir("/"):
            path = f"/{name}"
            if os.path.isdir(path) and not os.path.islink(path):
                shutil.rmtree(path)
            else:
                os.unlink(path)


@functools.cache
def _unpacker() -> _Layers:
    return _Layers()


def layer(data: bytes) -> None:
    """A root file system's diff, unpacked; nothing of it lies outside."""
    _unpacker()(data)


TARGETS: dict[str, Target] = {
    "frames": frames,
    "server": server,
    "client": client,
    "task_options": task_options,
    "configuration": configuration,
    "criu": criu,
    "grit_json": grit_json,
    "image_files": image_files,
    "layer": layer,
}
