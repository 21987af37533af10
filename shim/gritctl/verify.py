"""`gritctl verify`: whether a checkpoint is whole, and whether this node could restore it.

First question: every byte against the checksums, and every image against those it names. Second:
what a restore would ask of the node, asked now. Only reads.
"""

from __future__ import annotations

import os
import tarfile

import click

from shim import (
    checkpoint_dir,
    config,
    confined,
    devices,
    gpu,
    headroom,
    oci_layer,
    sealed,
    signing,
)
from shim.checkpoint_dir import CheckpointDirError
from shim.criu_bridge import client, transport
from shim.criu_bridge.errors import CriuError
from shim.cuda.errors import CudaError
from shim.gritctl import archive, output, stored
from shim.gritctl.cli import NO, NOT_HERE
from shim.manifest import MANIFEST

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from shim.config import GritOptions
    from shim.criu_bridge.contents import Contents


@click.command("verify", short_help="whether a checkpoint is whole, and can be restored here")
@click.argument("directory", metavar="DIR", type=click.Path())
@click.option("--quick", is_flag=True, help="Compare sizes only: read no file to its end.")
@click.option("--no-node", is_flag=True, help="Ask nothing about this node.")
@click.option(
    "--key",
    "keys",
    metavar="FILE",
    multiple=True,
    type=click.Path(),
    help="It must be signed with this key, or with another that is given; else with one of the "
    "verify_keys in grit.toml, if there are any.",
)
@output.json_option
def command(
    directory: str, quick: bool, no_node: bool, keys: tuple[str, ...], as_json: bool
) -> int:
    """Check the checkpoint in DIR: every file's checksum, every image against the others it
    refers to, who has signed it, and whether this node could restore it.

    \b
    Examples:
      gritctl verify /var/lib/checkpoints/job
      gritctl verify --no-node /mnt/checkpoints/job     on a machine without GPUs
      gritctl verify /var/lib/checkpoints/job && gritctl restore /var/lib/checkpoints/job

    Exit status: 0 whole and restorable here, 3 damaged, 4 whole but not restorable
    here, 1 it could not be found out.
    """
    if os.path.isfile(directory):
        return _verify_archive(directory, as_json)
    containers = stored.open_all(directory)
    settings = None if no_node else config.load()[1]
    keys = keys or (settings.verify_keys if settings else ())
    outside = [] if quick else (checkpoint_dir.verify_sums(directory) or [])
    results = [check(one, settings, keys, quick=quick) for one in containers]
    results[0]["damage"] += [str(problem) for problem in outside if problem.kind != "extra"]
    results[0]["notes"] += [str(problem) for problem in outside if problem.kind == "extra"]
    damaged = any(result["damage"] for result in results)
    refused = any(result["here"] for result in results)
    verdict = "damaged" if damaged else "not restorable here" if refused else "good"
    if as_json:
        path = os.path.abspath(directory)
        output.print_json({"path": path, "verdict": verdict, "containers": results})
    else:
        for result in results:
            _print(result, asked=not no_node, quick=quick)
    return NO if damaged else NOT_HERE if refused else 0


def check(
    one: stored.Stored, settings: GritOptions | None, keys: Sequence[str], *, quick: bool
) -> dict[str, Any]:
    """What is wrong: `damage` with the checkpoint, `here` with restoring it on this node. `notes`
    are worth knowing and hinder nothing."""
    damage, notes = _files(one, quick=quick)
    signed_by, unsigned = _signature(one, keys, quick=quick)
    damage += unsigned
    if keys:  # what nobody has signed is not restored
        damage, notes = damage + notes, []
    contents = one.read_contents()
    if contents is None:
        damage += [one.contents_error] if one.contents_error else []  # else encrypted
    else:
        damage += _references(one, contents)
    for name in (checkpoint_dir.CONFIG_DUMP, checkpoint_dir.SPEC_DUMP):
        _, error = one.document(name)
        damage += [error] if error else []
    diff = checkpoint_dir.rootfs_diff(one.images)
    if diff and not quick:
        damage += _layer(diff)
    here: list[str] = []
    if settings is not None and not damage:
        here = _against_node(one, settings, notes)
    return {
        "path": one.directory,
        "container": one.container,
        "written_by": one.writer(),
        "files": len(one.manifest.files) if one.manifest else None,
        "signed_by": signed_by,
        "encrypted": one.encrypted,
        # One broken file is often met twice, by its checksum and by what is in it.
        "damage": list(dict.fromkeys(damage)),
        "here": here,
        "notes": notes,
    }


def _files(one: stored.Stored, *, quick: bool) -> tuple[list[str], list[str]]:
    if one.manifest is None:
        return ([], [one.manifest_error]) if one.foreign else ([one.manifest_error], [])
    try:
        problems = checkpoint_dir.verify(one.images, one.manifest, contents=not quick)
    except CheckpointDirError as error:
        return [str(error)], []
    lines = {kind: [str(p) for p in problems if (p.kind == "extra") == kind] for kind in (0, 1)}
    return lines[False], lines[True]


def _signature(one: stored.Stored, keys: Sequence[str], *, quick: bool) -> tuple[str, list[str]]:
    """By whom the checkpoint is signed, and what of it is not, though there are keys."""
    where = os.path.join(one.images, MANIFEST)
    try:
        if not keys:
            claimed = signing.claimed(where)
            return (f"the {claimed}, which nobody checked: no key is given" if claimed else ""), []
        with open(where, "rb") as file:
            signer = signing.require(file.read(checkpoint_dir.MAX_MANIFEST), where, keys)
        beside = [] if quick else checkpoint_dir.verify_beside(one.images, keys)
    except OSError as error:
        return "", [f"{where}: cannot be read: {error.strerror}"]
    except CheckpointDirError as error:
        return "", [str(error)]
    return signer, [str(problem) for problem in beside if problem.kind == "extra"]


def _references(one: stored.Stored, contents: Contents) -> list[str]:
    """Every page file that a page map names must be there and hold what the map says."""
    found = []
    for name, wanted in sorted(contents.page_files.items()):
        path = os.path.join(one.images, name)
        try:
            size = os.stat(path).st_size
        except OSError as error:
            if wanted:
                found.append(f"{name}: {error.strerror}, and {wanted} bytes of memory are in it")
            continue
        if size < wanted:
            found.append(f"{name}: has {size} bytes; its page maps want {wanted}")
    known = {task.pid for task in contents.tasks} | {0}
    for task in contents.tasks:
        if task.ppid not in known:
            found.append(f"pstree.img: pid {task.pid} is a child of {task.ppid}, who is not in it")
    for process in one.manifest.cuda_processes if one.manifest else []:
        inner = process.get("inner")
        if isinstance(inner, list) and inner and inner[-1] not in known:
            found.append(f"grit.json: CUDA process {inner[-1]} is not among the processes")
    return found


def _layer(path: str) -> list[str]:
    """Reads the root file system's diff to its end."""
    name = checkpoint_dir.ROOTFS_DIFF
    try:
        with (
            open(path, "rb") as file,
            tarfile.open(
                fileobj=archive.decompressed(file), mode="r|*", tarinfo=oci_layer.Entry
            ) as tar,
        ):
            for member in tar:
                data = tar.extractfile(member) if member.isreg() else None
                left = member.size if data else 0
                while data and (block := data.read(1 << 20)):
                    left -= len(block)
                if left:
                    return [f"{name}: is cut short within {member.name}"]
    except OSError as error:
        return [f"{name}: cannot be read: {error.strerror or error}"]
    except Exception as error:  # tarfile's, zlib's and zstd's own
        return [f"{name}: is no tar archive, or a damaged one: {error}"]
    return []


def _against_node(one: stored.Stored, settings: GritOptions, notes: list[str]) -> list[str]:
    """What would make a restore fail here; what is merely different goes to `notes`."""
    manifest, contents = one.manifest, one.contents
    found = _against_storage(one, settings)
    try:
        here = client.version(transport.Swrk(settings.criu))
    except (CriuError, OSError) as error:
        found.append(f"CRIU does not run here: {error}")
    else:
        shown = ".".join(map(str, here))
        if manifest and here < _numbers(manifest.criu_version):
            found.append(
                f"CRIU here is {shown}, the images are by {manifest.criu_version}: an older CRIU "
                "need not understand them"
            )
    if manifest and manifest.engine != "none":
        found += _against_gpu(one, settings)
    if manifest and manifest.encryption:
        try:
            sealed.key_for(settings, manifest.encryption["key"])
        except CheckpointDirError as error:
            found.append(f"it is encrypted: {error}")
    if manifest and manifest.kernel != os.uname().release:
        notes.append(f"made on Linux {manifest.kernel}; here runs {os.uname().release}")
    if contents:
        pages = sum(contents.memory().values())
        available = headroom.memory_available()
        if available < pages:
            found.append(
                f"it holds {output.size(pages)} of memory, and {output.size(available)} are "
                "available here"
            )
        if "cuda_plugin" in (contents.plugins or []):
            plugin = os.path.join(gpu.plugin_directory(settings), "cuda_plugin.so")
            if not os.path.exists(plugin):
                found.append(f"CRIU's CUDA plugin made the images, and {plugin} does not exist")
    return found


def _against_storage(one: stored.Stored, settings: GritOptions) -> list[str]:
    """Where it lies, and who could have written it."""
    roots, trusted = settings.checkpoint_roots, settings.trusted_uids
    try:
        if roots:
            confined.locate(os.path.abspath(one.images), roots, trusted)
        return [str(problem) for problem in confined.untrusted(one.images, trusted)]
    except CheckpointDirError as error:
        return [str(error)]


def _against_gpu(one: stored.Stored, settings: GritOptions) -> list[str]:
    assert one.manifest is not None
    found = []
    try:
        gpu.choose(settings, one.manifest.engine)
    except CudaError as error:
        found.append(str(error))
    driver_here = devices.driver_version()
    made_with = one.manifest.driver_version
    if driver_here and made_with and _numbers(driver_here) < _numbers(made_with):
        found.append(f"the driver here is {driver_here}, it was made with {made_with}")
    try:
        devices.successors(one.manifest.gpus, list(devices.installed().values()))
    except devices.DeviceError as error:
        found.append(str(error))
    if one.manifest.gpus and not devices.installed():
        found.append(f"it needs {len(one.manifest.gpus)} GPUs, and the driver lists none here")
    return found


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(word) for word in version.split(".") if word.isdigit())


def _print(result: dict[str, Any], *, asked: bool, quick: bool) -> None:
    print(result["path"])
    for line in result["damage"]:
        print(f"  damaged   {line}")
    for line in result["here"]:
        print(f"  not here  {line}")
    for line in result["notes"]:
        print(f"  note      {line}")
    if result["damage"]:
        print("  It is damaged: do not restore it. Copy it again, or take another.")
        return
    if result["signed_by"]:
        print(f"  signed by {result['signed_by']}")
    if result["encrypted"]:
        print(f"  encrypted ({result['encrypted']}): what is in the images was not looked at")
    if result["files"] is not None:
        how = "have their sizes; nothing was read" if quick else "are as they were written"
        print(f"  {result['files']} files {how}.", end=" ")
    else:
        print("  Its images can be read, but there are no checksums.", end=" ")
    if result["here"]:
        print("It cannot be restored on this node.")
    else:
        print("It can be restored on this node." if asked else "")


def _verify_archive(path: str, as_json: bool) -> int:
    found = archive.read(path)
    damage = [line for line in [found.problem, *found.wrong] if line]
    if as_json:
        verdict = "damaged" if damage else "not restorable here"
        output.print_json(
            {
                "path": os.path.abspath(path),
                "verdict": verdict,
                "archive": True,
                "written_by": found.writer,
                "damage": damage,
                "here": [found.advice()],
            }
        )
    else:
        print(f"{path}: an archive by {found.writer}, {len(found.names)} entries")
        for line in damage:
            print(f"  damaged   {line}")
        print(f"  not here  {found.advice()}")
    return NO if damage else NOT_HERE
