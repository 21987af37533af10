"""`gritctl show`: what a checkpoint holds."""

from __future__ import annotations

import os

import click
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from shim import checkpoint_dir
from shim.gritctl import archive, output, stored

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from rich.console import RenderableType

_LONG = 8  # files, mounts or sockets shown without --all


@click.command("show", short_help="what a checkpoint holds")
@click.argument("directory", metavar="DIR", type=click.Path())
@click.option("--all", "everything", is_flag=True, help="Every open file and mount.")
@click.option("--plot", "file", metavar="FILE", help="Draw bytes and seconds there, as SVG.")
@output.json_option
def command(directory: str, everything: bool, file: str | None, as_json: bool) -> int:
    """Show what the checkpoint in DIR holds: processes, memory by kind, GPU memory, open files,
    sockets, mounts, and what it needs of the node that restores it.

    Nothing is checked against checksums: that is `gritctl verify`.

    \b
    Examples:
      gritctl show /var/lib/checkpoints/job
      gritctl show --all /var/lib/checkpoints/job
      gritctl show --plot job.svg /var/lib/checkpoints/job
      gritctl show --json /var/lib/checkpoints/job | jq '.containers[].memory'
    """
    if os.path.isfile(directory):
        found = archive.read(directory)
        if as_json:
            output.print_json(describe_archive(found))
        else:
            _print_archive(found)
        return 3 if found.problem or found.wrong else 0
    containers = stored.open_all(directory)
    if file:
        from shim.gritctl import compare

        compare.write(file, compare.bars([directory]))
    documents = [describe(one) for one in containers]
    if as_json:
        output.print_json({"path": os.path.abspath(directory), "containers": documents})
    else:
        console = output.console()
        for document in documents:
            console.print(picture(document, everything=everything))
    return 3 if any(document["problems"] for document in documents) else 0


def describe(one: stored.Stored) -> dict[str, Any]:
    """All that `show` says of a container's checkpoint, as JSON has it."""
    contents = one.read_contents()
    manifest = one.manifest
    config, config_error = one.document(checkpoint_dir.CONFIG_DUMP)
    spec, spec_error = one.document(checkpoint_dir.SPEC_DUMP)
    problems = [config_error, spec_error, one.contents_error]
    if not one.foreign:
        problems.insert(0, one.manifest_error)
    beside = os.path.dirname(one.images)
    diff = checkpoint_dir.rootfs_diff(one.images)
    log = os.path.join(beside, checkpoint_dir.CONTAINER_LOG)
    found: dict[str, Any] = {
        "path": one.directory,
        "images": one.images,
        "container": one.container,
        "name": one.name or stored.text(config.get("name")),
        "written_by": one.writer(),
        "bytes": one.bytes(),
        "image": one.image,
        "rootfs_diff_bytes": os.path.getsize(diff) if diff else None,
        "log_bytes": os.path.getsize(log) if os.path.isfile(log) else None,
        "problems": [problem for problem in problems if problem],
    }
    if manifest:
        found |= {
            "namespace": manifest.namespace,
            "created": manifest.created,
            "hostname": manifest.hostname,
            "kernel": manifest.kernel,
            "criu": manifest.criu_version,
            "engine": manifest.engine,
            "driver": manifest.driver_version,
            "gpus": manifest.gpus,
            "options": manifest.options,
            "phases": manifest.phases,
            "encrypted": one.encrypted,
            "compressed": one.compressed,
            "gpu_processes": manifest.cuda_processes,
        }
    if contents:
        found |= {
            "memory": memory(one),
            "processes": [
                {
                    "pid": task.pid,
                    "ppid": task.ppid,
                    "command": task.comm,
                    "threads": task.threads,
                    "memory": task.memory,
                }
                for task in contents.tasks
            ],
            "files": [{"kind": kind, "what": what} for kind, what in contents.files],
            "mounts": [
                {"at": at, "filesystem": kind, "external": key} for at, kind, key in contents.mounts
            ],
            "plugins": contents.plugins,
        }
    found["needs"] = needs(one, spec)
    return found


def memory(one: stored.Stored) -> dict[str, int]:
    """Bytes by kind. With the plugin engine the device memory is not to be told from other
    memory by its place; its size is what the driver had said."""
    found = one.contents.memory() if one.contents else {}
    if "device" in found or not one.manifest:
        return found
    device = sum(
        size
        for process in one.manifest.cuda_processes
        if isinstance(size := process.get("device_bytes") or process.get("held_bytes"), int)
    )
    device = min(device, found.get("anonymous", 0))
    if device:
        found["anonymous"] -= device
        found["device"] = device
    return found


def needs(one: stored.Stored, spec: dict[str, Any]) -> list[str]:
    """What the node, or the container to be restored into, must have: lines for people."""
    found = []
    manifest, contents = one.manifest, one.contents
    if manifest:
        if manifest.engine != "none":
            driver = (
                f", driver {manifest.driver_version} or later" if manifest.driver_version else ""
            )
            found.append(f"the {manifest.engine} engine{driver}")
        kinds: dict[str, int] = {}
        for gpu in manifest.gpus:
            kinds[gpu["name"]] = kinds.get(gpu["name"], 0) + 1
        found += [f"{count} x {name}" for name, count in kinds.items()]
        found.append(f"CRIU {manifest.criu_version} or later")
        if manifest.options.get("tcp_established"):
            found.append("the same IP addresses, for its open TCP connections")
        if manifest.options.get("ext_unix_sockets"):
            found.append("the other ends of its external unix sockets")
    if one.image:
        found.append(f"the image {one.image}")
    if contents:
        found += [f"CRIU's plugin {name}" for name in contents.plugins or []]
        outside = [at for at, _, key in contents.mounts if key and key != "/dev/null"]
        found += [f"a mount at {at}" for at in outside]
        found.append(f"{output.size(sum(contents.memory().values()))} of memory")
    devices = (
        (spec.get("linux") or {}).get("devices") if isinstance(spec.get("linux"), dict) else []
    )
    for device in devices if isinstance(devices, list) else []:
        if isinstance(device, dict) and stored.text(device.get("path")):
            found.append(f"the device {device['path']}")
    return found


def picture(document: dict[str, Any], *, everything: bool = False) -> RenderableType:
    """What `show` prints for a container."""
    head = Text(document["path"], style="bold")
    tree = Tree(head, guide_style="dim")
    for problem in document["problems"]:
        tree.add(Text(f"broken: {problem}", style="bold red"))
    facts = Table.grid(padding=(0, 2))
    for label, value in _facts(document):
        facts.add_row(Text(label, style="cyan"), Text(value))
    tree.add(facts)
    if "memory" in document:
        _add(tree, "memory", _memory_lines(document["memory"]), everything=True)
        _add(tree, "processes", _process_lines(document["processes"]), everything=everything)
    if document.get("phases"):
        lines = [f"{name:10} {output.seconds(s)}" for name, s in document["phases"].items()]
        _add(tree, "time", lines, everything=True)
    if "files" in document:
        files = [f"{f['kind']:16} {f['what']}".rstrip() for f in document["files"]]
        sockets = [line for line in files if "socket" in line[:16]]
        _add(tree, "files", [line for line in files if line not in sockets], everything=everything)
        _add(tree, "sockets", sockets, everything=everything)
        mounts = [
            f"{m['at']:24} {m['filesystem']}"
            + (f"  from outside: {m['external']}" * bool(m["external"]))
            for m in document["mounts"]
        ]
        _add(tree, "mounts", mounts, everything=everything)
    _add(tree, "needs", document["needs"], everything=True)
    return tree


def _facts(document: dict[str, Any]) -> Iterable[tuple[str, str]]:
    name = f" ({document['name']})" if document["name"] not in ("", document["container"]) else ""
    yield "container", document["container"] + name
    if document["image"]:
        yield "image", document["image"]
    if "created" in document:
        yield "made", f"{document['created']} on {document['hostname']}, by grit"
        yield "with", f"CRIU {document['criu']}, Linux {document['kernel']}"
        if document["engine"] == "none":
            yield "GPU", "none used"
        else:
            driver = f", driver {document['driver']}" if document["driver"] else ""
            yield "GPU", f"{document['engine']} engine{driver}"
    elif not document["problems"]:
        yield "made", f"by {document['written_by']}: it has no checksums"
    if document.get("encrypted"):
        yield "encrypted", f"{document['encrypted']}; what is in the images cannot be shown"
    if document.get("compressed"):
        yield "compressed", f"GPU memory, by {document['compressed']}"
    yield "size", output.size(document["bytes"])
    if document["rootfs_diff_bytes"] is not None:
        yield "files changed", output.size(document["rootfs_diff_bytes"]) + " in rootfs-diff.tar"
    if document["log_bytes"] is not None:
        yield "log", output.size(document["log_bytes"]) + " in container.log"


def _memory_lines(found: dict[str, int]) -> list[Text]:
    names = {"device": "GPU, as copied to the host", "file": "changed pages of files"}
    biggest = max(found.values(), default=0) or 1
    lines = []
    for kind, size in sorted(found.items(), key=lambda item: -item[1]):
        line = Text(f"{names.get(kind, kind):28}{output.size(size):>10}  ")
        line.append(
            "█" * max(1, round(30 * size / biggest)), "green" if kind == "device" else "blue"
        )
        lines.append(line)
    lines.append(Text(f"{'all':28}{output.size(sum(found.values())):>10}", style="bold"))
    return lines


def _process_lines(processes: list[dict[str, Any]]) -> list[str]:
    """A tree by indentation, parents before children as CRIU has them."""
    depth: dict[int, int] = {}
    lines = []
    for one in processes:
        depth[one["pid"]] = depth.get(one["ppid"], -1) + 1
        size = output.size(sum(one["memory"].values()))
        gpu = f", {output.size(one['memory']['device'])} GPU" if "device" in one["memory"] else ""
        threads = f", {one['threads']} threads" if one["threads"] > 1 else ""
        indent = "  " * depth[one["pid"]]
        lines.append(f"{indent}{one['pid']} {one['command']}  {size}{gpu}{threads}")
    return lines


def _add(tree: Tree, label: str, lines: list[Text] | list[str], *, everything: bool) -> None:
    if not lines:
        return
    branch = tree.add(Text(label, style="cyan"))
    shown = lines if everything or len(lines) <= _LONG + 1 else lines[:_LONG]
    for line in shown:
        branch.add(line if isinstance(line, Text) else Text(line))
    if len(shown) < len(lines):
        branch.add(Text(f"... and {len(lines) - len(shown)} more; --all shows them", style="dim"))


def describe_archive(found: archive.Archive) -> dict[str, Any]:
    return {
        "path": os.path.abspath(found.path),
        "archive": True,
        "written_by": found.writer,
        "container": found.container,
        "image": found.image,
        "bytes": found.bytes,
        "unpacked_bytes": found.unpacked,
        "files": found.names,
        "problems": [problem for problem in [found.problem, *found.wrong] if problem],
        "advice": found.advice(),
    }


def _print_archive(found: archive.Archive) -> None:
    print(f"{found.path}: an archive by {found.writer}")
    print(f"  container  {found.container}" + (f", image {found.image}" if found.image else ""))
    print(f"  size       {output.size(found.bytes)}, {output.size(found.unpacked)} unpacked")
    inside = [name for name in found.names if "/" not in name]
    print(f"  holds      {', '.join(inside)}")
    for problem in [found.problem, *found.wrong]:
        if problem:
            print(f"  broken     {problem}")
    print(f"  {found.advice()}")
