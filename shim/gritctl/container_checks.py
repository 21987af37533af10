"""What stands against a checkpoint of one running container: what the shim itself would ask first
(`preflight`), asked without touching the container.
"""

from __future__ import annotations

import os

from shim import cgroup, config, gpu, headroom, messages, preflight, runcstate
from shim.cuda import discovery
from shim.cuda.errors import CudaError
from shim.cuda.suspension import from_candidate
from shim.gritctl import output
from shim.gritctl.node_checks import FAIL, PASS, WARN, Line
from shim.protowire import DecodeError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from shim.config import GritOptions
    from shim.gritctl.containerd import Containerd
    from shim.gritctl.targets import Target


class Seen:
    """A container as `headroom` looks at it: by runc's record, and without its shim."""

    def __init__(self, id_: str, state: runcstate.RunState, options: GritOptions) -> None:
        self.id = id_
        self.config = options
        self._state = state

    def pids(self) -> list[int]:
        return cgroup.processes(self._state.freezer_path or "")

    def memory_group(self) -> str:
        paths = self._state.cgroup_paths
        return paths.get("memory") or paths.get("", "")


def container(connection: Containerd, target: Target, directory: str) -> Iterator[Line]:
    label = f"container {target}"
    options, runc_root, problem = _settings(target)
    if problem:
        yield Line(label, FAIL, problem, "correct it, and start the container anew")
        return
    try:
        state = runcstate.load(runc_root, connection.namespace, target.id)
    except runcstate.StateError as error:
        yield Line(label, WARN, f"not looked at: {error}", "be root, on the container's node")
        return
    seen = Seen(target.id, state, options)
    pids = seen.pids()
    candidates = discovery.candidates(pids)
    problems: list[str] = []
    held = 0
    if candidates:
        try:
            with gpu.helper(options) as driver:
                found, _, survey = preflight.against_cuda(options, driver, candidates)
        except CudaError as error:
            yield Line(label, FAIL, str(error))
            return
        problems += found
        processes = []
        for one in candidates:
            process = from_candidate(one)
            process.held_bytes = survey.used(one.pid)
            held += process.held_bytes or 0
            processes.append(process)
        lack = headroom.lack(seen, processes)  # type: ignore[arg-type]
        problems += [lack] if lack else []
    problems += preflight.against_dump(pids)
    place = os.path.abspath(directory)
    while not os.path.isdir(place):
        place = os.path.dirname(place)
    problems += preflight.against_space(place, pids, held)
    for one_problem in problems:
        yield Line(label, FAIL, one_problem)
    if not problems:
        text = f"{len(pids)} processes, {len(candidates)} with the GPU ({output.size(held)} in use)"
        yield Line(label, PASS, text)


def _settings(target: Target) -> tuple[GritOptions, str, str]:
    """The container's grit.toml, runc's root, and what is wrong with either."""
    runtime = target.container.runtime
    value = runtime.options.value if runtime and runtime.options else b""
    kind = runtime.options.type_url if runtime and runtime.options else ""
    try:
        if kind == messages.RUNTIME_OPTIONS:
            named = messages.RuntimeOptions.decode(value)
            if named.config_body:
                text = named.config_body.decode()
                runc, ours = config.parse(text, "containerd's configuration")
            else:
                runc, ours = config.load(named.config_path or None)
            return ours, runc.root or runcstate.DEFAULT_ROOT, ""
        if kind == messages.RUNC_OPTIONS:
            root = messages.RuncOptions.decode(value).root
            return config.load()[1], root or runcstate.DEFAULT_ROOT, ""
        return config.load()[1], runcstate.DEFAULT_ROOT, ""
    except (config.ConfigError, DecodeError, UnicodeDecodeError) as error:
        return config.GritOptions(), runcstate.DEFAULT_ROOT, str(error)
