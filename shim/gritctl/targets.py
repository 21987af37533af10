"""Which containers a person means: by container id, by the beginning of one, or a whole pod by its
name or its sandbox. The one place that knows what CRI writes into a container's labels,
annotations and extensions (containerd 1.6 to 2.1, internal/cri/{labels,annotations}).
"""

from __future__ import annotations

import json
import os

from shim import group, places
from shim.gritctl import messages as m
from shim.gritctl.containerd import CONTAINERS, Containerd, ContainerdError
from shim.gritctl.stored import text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_POD = "io.kubernetes.pod.name"
_POD_NAMESPACE = "io.kubernetes.pod.namespace"
_NAME = "io.kubernetes.container.name"
_SANDBOX = "io.kubernetes.cri.sandbox-id"
_TYPE = "io.kubernetes.cri.container-type"
_METADATA = "io.cri-containerd.container.metadata"


class Target:
    """A container with its task. `name` is how its pod calls it, "" outside a pod."""

    def __init__(self, container: m.Container, task: m.Task, name: str) -> None:
        self.container, self.task, self.name = container, task, name
        self.id = container.id
        self.spec = spec_of(container)

    def __str__(self) -> str:
        return self.name or self.id


def find(containerd: Containerd, wanted: str) -> tuple[list[Target], bool]:
    """The running or paused containers that `wanted` means, and whether it means a pod.

    Raises ContainerdError naming what there is instead."""
    every = containerd.containers()
    chosen, pod = _chosen(containerd, every, wanted)
    found = []
    for container in chosen:
        task = containerd.task(container.id)
        if task and task.status in (m.RUNNING, m.PAUSED):
            found.append(Target(container, task, _name(container) if pod else ""))
        elif not pod:
            state = "it has stopped" if task else "it was not started"
            raise ContainerdError(
                "FAILED_PRECONDITION", f"container {wanted} is not running: {state}"
            )
    if not found:
        raise ContainerdError("FAILED_PRECONDITION", f"no container of pod {wanted} is running")
    names = [one.name for one in found]
    odd = [name for name in names if name[:1] in ("", ".") or "/" in name]
    if pod and (len(set(names)) < len(names) or odd):
        raise ContainerdError(
            "FAILED_PRECONDITION",
            f"the containers of pod {wanted} have no names to tell them by: {', '.join(names)}",
        )
    return found, pod


def labelled(pod: str) -> str:
    """containerd's filter for the containers, the sandbox included, of `<namespace>/<name>`."""
    namespace, _, name = pod.partition("/")
    return f'labels."{_POD}"=="{name}",labels."{_POD_NAMESPACE}"=="{namespace}"'


def under_grit(target: Target, namespace: str) -> bool | None:
    """Whether grit runs the container, by the runtime's name or the shims' own records: another
    name, too, may lead to grit's binary. None where those are only shown to root."""
    runtime = target.container.runtime
    if runtime and runtime.name == "io.containerd.grit.v1":
        return True
    try:
        groups = os.listdir(places.RUN)
        bundles = [group.tasks(os.path.join(places.RUN, one)).get(target.id) for one in groups]
    except FileNotFoundError:
        return False
    except PermissionError:
        return None
    return any(one and os.path.basename(os.path.dirname(one)) == namespace for one in bundles)


def spec_of(container: m.Container) -> dict[str, Any]:
    """The OCI runtime specification; {} where there is none that can be read."""
    try:
        found = json.loads(container.spec.value) if container.spec else {}
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def log_of(target: Target) -> str:
    """The path of the container's log, "" if it is not known: CRI's, or `ctr run --log-uri`."""
    for extension in target.container.extensions:
        if extension.key == _METADATA and extension.value:
            try:
                path = json.loads(extension.value.value)["Metadata"]["LogPath"]
            except (ValueError, LookupError, TypeError):
                break
            return text(path)
    return target.task.stdout.removeprefix("file://") if "file:///" in target.task.stdout else ""


def _chosen(
    containerd: Containerd, every: list[m.Container], wanted: str
) -> tuple[list[m.Container], bool]:
    for container in every:
        if container.id == wanted:
            if _annotation(container, _TYPE) == "sandbox":
                break
            return [container], False
    in_pod = [
        one
        for one in every
        if _annotation(one, _TYPE) != "sandbox"
        and (
            _annotation(one, _SANDBOX) == wanted
            or wanted in (one.labels.get(_POD), _full_name(one))
        )
    ]
    if in_pod:
        pods = sorted({_full_name(one) or wanted for one in in_pod})
        if len(pods) > 1:
            raise ContainerdError(
                "FAILED_PRECONDITION", f"{wanted} is the name of several pods: {', '.join(pods)}"
            )
        return in_pod, True
    begun = [one for one in every if len(wanted) >= 4 and one.id.startswith(wanted)]
    if len(begun) == 1:
        return begun, False
    if begun:
        raise ContainerdError(
            "FAILED_PRECONDITION",
            f"several containers begin with {wanted}: {', '.join(one.id for one in begun[:5])}",
        )
    raise ContainerdError("NOT_FOUND", _not_found(containerd, every, wanted))


def _not_found(containerd: Containerd, every: list[m.Container], wanted: str) -> str:
    text_ = f"no container and no pod {wanted} in containerd's namespace {containerd.namespace}"
    here = containerd.namespace
    for other in ("default", "k8s.io", "moby", "nerdctl"):
        if other == here:
            continue
        containerd.namespace = other
        try:
            containerd.call(CONTAINERS, "Get", m.Id(id=wanted), m.OneContainer)
        except ContainerdError:
            continue
        finally:
            containerd.namespace = here
        return f"{text_}; there is one in {other}: --namespace {other}"
    if every:
        shown = ", ".join(one.id for one in every[:5]) + (", ..." if len(every) > 5 else "")
        return f"{text_}, which has {shown}"
    return f"{text_}, which has no containers at all; Kubernetes' are in --namespace k8s.io"


def _annotation(container: m.Container, key: str) -> str:
    notes = spec_of(container).get("annotations")
    return text(notes.get(key)) if isinstance(notes, dict) else ""


def _name(container: m.Container) -> str:
    note = _annotation(container, "io.kubernetes.cri.container-name")
    return container.labels.get(_NAME) or note or container.id


def _full_name(container: m.Container) -> str:
    labels = container.labels
    return f"{labels.get(_POD_NAMESPACE, '')}/{labels[_POD]}" if _POD in labels else ""
