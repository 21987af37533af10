"""What the node's agent and the shims tell each other of Restores: the names of the files, and the
shim's half. A container that is created asks whether a Restore means it, since only the agent knows
its pod's labels and owner.

    <namespace>.<uid>.pending   the agent's: a Restore, by its uid, may mean a pod of this
                                namespace. Touched whenever the agent has heard the API server
    <container>.question        the shim's: the container is about to be created
    <container>.answer          the agent's: {"directory", "restore"} for a container that is to be
                                restored, {"refused"} for one that must not start, {} for others
    <container>.outcome         the shim's: {"restore", "namespace", "name", "error"}, "" if it runs

A pod that the optional webhook has annotated asks nothing, and tells the outcome alike.

Every file comes by a rename, into a directory that is root's alone.
"""

from __future__ import annotations

import os
import time

from shim import bundle, cri, group, log, places

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from shim.container import Container

PENDING, QUESTION, ANSWER, OUTCOME = ".pending", ".question", ".answer", ".outcome"

RESTORE_UID = "grit.dev/restore-uid"
"""Which Restore has annotated the pod."""

SILENT_SECONDS = 300.0
"""After this the agent is taken for dead: until then containers wait for it to come back, and
after that nothing does."""

_LOOK_SECONDS = 0.05


class Unanswered(Exception):
    """Whether the container is to be restored is not known, or it must not start; it was not
    created."""


def ask(container: Container, spec: dict[str, Any]) -> str:
    """The uid of the Restore that means the container, "" if none does: its specification then
    names the checkpoint. Costs one look into a directory where nothing is pending.

    Raises Unanswered.
    """
    notes = bundle.annotations_of(spec)
    if not cri.sandbox_id(notes) or cri.is_sandbox(notes) or not _expected(notes):
        return ""
    answer = _answer(container)
    if answer.get("refused"):
        raise Unanswered(f"container {container.id}: {answer['refused']}")
    if not answer.get("directory"):
        return ""
    spec["annotations"] = {**notes, bundle.RESTORE_ANNOTATION: answer["directory"]}
    bundle.write_spec(container.bundle, spec)
    log.info("a Restore means this container", id=container.id, directory=answer["directory"])
    return str(answer["restore"])


def annotated(spec: dict[str, Any]) -> str:
    """The uid of the Restore for which the webhook has annotated the container's pod, "" if none;
    what it is must not be believed of another namespace."""
    notes = bundle.annotations_of(spec)
    told = cri.sandbox_id(notes) and cri.pod_namespace(notes) and not cri.is_sandbox(notes)
    return notes.get(RESTORE_UID, "") if told else ""


def tell(container: Container, error: str) -> None:
    """How the restore ended, "" for well. The container's fate does not hang on it."""
    import json

    try:
        notes = bundle.annotations_of(bundle.read_spec(container.bundle))
        told = {
            "restore": container.meant,
            "namespace": cri.pod_namespace(notes),
            "name": cri.container_name(notes),
            "error": error,
        }
        bundle.replace(_path(container, OUTCOME), json.dumps(told), mode=0o600)
    except (OSError, ValueError) as problem:
        log.warning("the agent was not told of a restore", id=container.id, error=problem)
    container.meant = ""


def _expected(notes: dict[str, str]) -> bool:
    """Whether an answer is to be expected: something is pending, and the agent lives."""
    namespace = cri.pod_namespace(notes)
    newest = 0.0
    for name in os.listdir(places.INTENTS):
        if name.endswith(PENDING) and (not namespace or name.startswith(f"{namespace}.")):
            try:
                newest = max(newest, os.stat(os.path.join(places.INTENTS, name)).st_mtime)
            except FileNotFoundError:
                continue
    if newest and time.time() - newest > SILENT_SECONDS:
        log.warning(
            "a Restore is pending, but the node's agent is silent; starting from the beginning",
            sandbox=cri.sandbox_id(notes),
            namespace=namespace,
        )
        return False
    return bool(newest)


def _answer(container: Container) -> dict[str, Any]:
    import json

    limit = container.config.agent_timeout
    deadline = time.monotonic() + limit
    question, answer = _path(container, QUESTION), _path(container, ANSWER)
    try:
        group.unlink(answer)
        bundle.replace(question, "", mode=0o600)
        while time.monotonic() < deadline:
            try:
                with open(answer, encoding="utf-8") as file:
                    found: dict[str, Any] = json.load(file)
                    return found
            except FileNotFoundError:
                time.sleep(_LOOK_SECONDS)
    finally:
        group.unlink(question)
        group.unlink(answer)
    raise Unanswered(
        f"container {container.id}: a Restore is pending in its namespace, and the node's agent "
        f"has not said within {limit:g} s whether it means this pod. Nothing was started; the "
        "kubelet will try again. Does the agent run on this node, and does it reach the API "
        f"server? When it has been silent for {SILENT_SECONDS:g} s the container starts from its "
        "beginning"
    )


def _path(container: Container, kind: str) -> str:
    return os.path.join(places.INTENTS, container.id + kind)
