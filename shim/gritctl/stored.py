"""A checkpoint on disk as an operator's command sees it: what can be read of it, and what cannot
and why. Nothing here raises because a checkpoint is damaged; that is what is to be told.
"""

from __future__ import annotations

import json
import os

from shim import checkpoint_dir
from shim.checkpoint_dir import CheckpointDirError, ForeignCheckpoint, ManifestError
from shim.criu_bridge import contents
from shim.criu_bridge.images import ImageError
from shim.manifest import NO_COMPRESSION

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from shim.criu_bridge.contents import Contents
    from shim.manifest import Manifest

PLACE = "/var/lib/checkpoints"
"""Where the documentation has checkpoints, and `ls` and `prune` look if not told otherwise."""

_DEPTH = 4  # of directories below the place that may hold checkpoints


class NotACheckpoint(Exception):
    """There is nothing at the path that could be a checkpoint; says what is there instead."""


class Stored:
    """One container's checkpoint. `name` is the container's in a pod's checkpoint, else "".

    `manifest` is None where there is none (`foreign`) or it cannot be used (`manifest_error`);
    `contents` is None where CRIU's images cannot be read (`contents_error`).
    """

    def __init__(self, directory: str, name: str, images: str) -> None:
        self.directory = os.path.join(directory, name) if name else directory
        self.name = name
        self.images = images
        self.manifest: Manifest | None = None
        self.manifest_error = ""
        self.foreign = False
        try:
            self.manifest = checkpoint_dir.load(images)
        except ForeignCheckpoint as error:
            self.foreign, self.manifest_error = True, str(error)
        except ManifestError as error:
            self.manifest_error = str(error)
        self.contents: Contents | None = None
        self.contents_error = ""

    @property
    def encrypted(self) -> str:
        """How, and with which key; "" if the images are as CRIU wrote them."""
        kind = self.manifest.encryption if self.manifest else None
        return f"{kind['algorithm']}, key {kind['key']}" if kind else ""

    def read_contents(self) -> Contents | None:
        """Fills in `contents`, or `contents_error`; returns the former. Neither where they are
        encrypted."""
        if self.contents is None and not self.contents_error and not self.encrypted:
            try:
                self.contents = contents.read(self.images, self.device_regions())
            except (ImageError, OSError) as error:
                self.contents_error = str(error)
            else:
                self._add_lane(self.contents)
        return self.contents

    def _add_lane(self, found: Contents) -> None:
        """CRIU's images do not speak of what the lane has moved past them."""
        tasks = {task.pid: task for task in found.tasks}
        for process in self.manifest.cuda_processes if self.manifest else []:
            lane, inner = process.get("lane"), process.get("inner")
            task = tasks.get(inner[-1]) if isinstance(inner, list) and inner else None
            if task is None or not isinstance(lane, list):
                continue
            sizes = [one[2] for one in lane if isinstance(one, list) and len(one) in (4, 5)]
            size = sum(size for size in sizes if isinstance(size, int))
            if size:
                task.memory["device"] = task.memory.get("device", 0) + size

    @property
    def compressed(self) -> str:
        """By what, and how much is left of it, where device memory is; else ""."""
        kind = self.manifest.compression.get("algorithm") if self.manifest else None
        if not self.manifest or not kind or kind == NO_COMPRESSION:
            return ""
        files = self.manifest.files
        memory = stored = 0
        for process in self.manifest.cuda_processes:
            lane = process.get("lane")
            for one in lane if isinstance(lane, list) else []:
                match one:
                    case [str(name), int(), int(size), *_] if name in files:
                        memory, stored = memory + size, stored + files[name].size
        return f"{kind}, to {stored / memory:.0%}" if memory else kind

    def device_regions(self) -> dict[int, list[tuple[int, int]]]:
        """Where in each process the copy of its device memory lies, by pid in the container."""
        found: dict[int, list[tuple[int, int]]] = {}
        for process in self.manifest.cuda_processes if self.manifest else []:
            region, inner = process.get("region"), process.get("inner")
            if (
                isinstance(region, list)
                and isinstance(inner, list)
                and [type(number) for number in (*region, *inner[-1:])] == [int, int, int]
            ):
                found.setdefault(inner[-1], []).append((region[0], region[1]))
        return found

    def document(self, file: str) -> tuple[dict[str, Any], str]:
        """A JSON object that lies beside the images (config.dump, spec.dump), and what is wrong
        with it: ("" for nothing); ({}, "") where it is not there."""
        path = os.path.join(os.path.dirname(self.images), file)
        if os.path.basename(self.images) != checkpoint_dir.IMAGES:
            return {}, ""
        try:
            with open(path, encoding="utf-8") as opened:
                found = json.load(opened)
        except FileNotFoundError:
            return {}, ""
        except (OSError, ValueError, RecursionError) as error:
            return {}, f"{path}: cannot be read: {error}"
        if not isinstance(found, dict):
            return {}, f"{path}: is not a JSON object"
        return found, ""

    @property
    def container(self) -> str:
        """The container's id by the manifest, else by config.dump, else "?"."""
        if self.manifest:
            return self.manifest.container_id
        return text(self.document(checkpoint_dir.CONFIG_DUMP)[0].get("id")) or "?"

    @property
    def image(self) -> str:
        if self.manifest and self.manifest.image:
            return self.manifest.image
        return text(self.document(checkpoint_dir.CONFIG_DUMP)[0].get("rootfsImageName"))

    def bytes(self) -> int:
        """Of all files of this container's checkpoint."""
        top = self.directory
        if os.path.basename(self.images) == checkpoint_dir.IMAGES:
            top = os.path.dirname(self.images)
        total = 0
        for base, _, names in os.walk(top):
            for name in names:
                try:
                    total += os.lstat(os.path.join(base, name)).st_size
                except OSError:
                    continue  # removed meanwhile
        return total

    def writer(self) -> str:
        """Who wrote it: grit, or what its files tell of another tool."""
        if not self.foreign:
            return "grit"
        spec, _ = self.document(checkpoint_dir.SPEC_DUMP)
        return writer_of(spec, os.listdir(os.path.dirname(self.images)))


def open_all(path: str) -> list[Stored]:
    """The containers' checkpoints at `path`. Raises NotACheckpoint, CheckpointDirError."""
    path = os.path.abspath(path)
    if not os.path.lexists(path):
        raise NotACheckpoint(f"{path}: there is no such directory")
    if not os.path.isdir(path):
        raise NotACheckpoint(f"{path} is not a directory")
    found = checkpoint_dir.image_directories(path)
    if not found:
        names = sorted(os.listdir(path))
        shown = f"it holds {', '.join(names[:4])}" if names else "it is empty"
        raise NotACheckpoint(
            f"{path} is not a checkpoint: it has neither checkpoint/ nor CRIU's images ({shown})"
        )
    return [Stored(path, name, images) for name, images in found]


def find(place: str) -> list[str]:
    """The checkpoints below a directory, or it itself. Raises CheckpointDirError."""
    place = os.path.abspath(place)
    if not os.path.isdir(place):
        raise CheckpointDirError(f"there is no directory {place}")
    found: list[str] = []

    def look(directory: str, depth: int) -> None:
        try:
            parts = checkpoint_dir.image_directories(directory)
            # A directory of several checkpoints looks like a pod's but for the checksums.
            if parts and (not parts[0][0] or os.path.exists(f"{directory}/{checkpoint_dir.SUMS}")):
                found.append(directory)
                return
            entries = sorted(os.scandir(directory), key=lambda entry: entry.name)
        except (OSError, CheckpointDirError):
            return  # not ours to read
        for entry in entries:
            if depth and entry.is_dir(follow_symlinks=False) and entry.name[0] != ".":
                look(entry.path, depth - 1)

    look(place, _DEPTH)
    return found


def writer_of(spec: dict[str, Any], names: list[str]) -> str:
    """The tool behind a foreign checkpoint, by its spec.dump's annotations and the files' names."""
    notes = spec.get("annotations")
    notes = notes if isinstance(notes, dict) else {}
    manager = text(notes.get("io.container.manager"))
    if manager == "libpod" or "network.status" in names:
        return "podman"
    if manager == "cri-o" or any(note.startswith("io.kubernetes.cri-o.") for note in notes):
        return "CRI-O"
    if "status.dump" in names or "io.kubernetes.cri.container-type" in notes:
        return "containerd's CRI"
    return "another tool"


def text(value: object) -> str:
    """A string out of a document that anybody may have written, "" for anything else."""
    return value if isinstance(value, str) else ""
