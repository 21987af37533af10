"""`gritctl doctor`: whether a checkpoint can work on this node, line by line, with the fix."""

from __future__ import annotations

import click
from rich.text import Text

from shim.gritctl import container_checks, containerd, node_checks, output, stored, targets
from shim.gritctl.cli import NO
from shim.gritctl.containerd import Containerd, ContainerdError
from shim.gritctl.node_checks import FAIL, PASS, WARN, Line

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

_MARKS = {PASS: ("ok", "green"), WARN: ("warn", "yellow"), FAIL: ("FAIL", "bold red")}


@click.command("doctor", short_help="whether checkpoints can work on this node")
@click.argument(
    "name", metavar="[CONTAINER|POD]", required=False, shell_complete=containerd.complete
)
@click.option(
    "--to", "directory", metavar="DIR", default=stored.PLACE, help="Where checkpoints would go."
)
@click.option("--no-gpu", is_flag=True, help="The node has no GPU, and need not have one.")
@containerd.options
@output.json_option
def command(
    name: str | None, directory: str, no_gpu: bool, namespace: str, address: str, as_json: bool
) -> int:
    """Look at everything that must hold for a checkpoint on this node: kernel, CRIU, driver,
    containerd, disk and memory. With a CONTAINER or POD, also at what stands against saving just
    that one. Changes nothing; run it as root to see all.

    \b
    Examples:
      gritctl doctor
      gritctl doctor job --to /mnt/checkpoints
      gritctl doctor --json | jq -r '.checks[] | select(.status == "fail") | .fix'

    Exit status: 0 a checkpoint can work (warnings do not count), 3 it cannot.
    """
    lines = list(_lines(name, directory, no_gpu, namespace, address))
    failed = any(line.status == FAIL for line in lines)
    if as_json:
        checks = [line.to_dict() for line in lines]
        output.print_json({"verdict": "fail" if failed else "pass", "checks": checks})
        return NO if failed else 0
    console = output.console()
    width = max(len(line.check) for line in lines)
    for line in lines:
        mark, style = _MARKS[line.status]
        told = f"{line.check:{width}}  {line.found}"
        console.print(Text.assemble((f"{mark:4}  ", style), told))
        if line.fix and line.status != PASS:
            console.print(Text(f"{'':{width + 6}}  -> {line.fix}", "cyan"))
    print()
    print("A checkpoint cannot work here." if failed else "A checkpoint can work here.")
    return NO if failed else 0


def _lines(
    name: str | None, directory: str, no_gpu: bool, namespace: str, address: str
) -> Iterator[Line]:
    daemon = node_checks.Daemon(address)
    options, line = node_checks.settings(node_checks.config_path(daemon))
    yield from node_checks.kernel()
    yield line
    yield from node_checks.trust(options)
    yield from node_checks.criu(options, daemon.path)
    if not no_gpu:
        yield from node_checks.graphics(options, daemon.path)
    yield from node_checks.node(directory)
    yield from node_checks.runtime(daemon)
    try:
        connection = Containerd(address, namespace)
    except ContainerdError as error:
        yield Line("containerd", FAIL, str(error), "start it, be root, or name its --address")
        return
    with connection:
        yield from node_checks.containerd(connection)
        if name:
            for target in targets.find(connection, name)[0]:
                yield from container_checks.container(connection, target, directory)
