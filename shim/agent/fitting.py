"""Which pod a Restore means, and whether a Checkpoint can be what it is restored from."""

from __future__ import annotations

from shim.agent.pods import arguments_of
from shim.agent.status import name_of
from shim.gritctl.stored import text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from shim.agent.api import Object
    from shim.agent.pods import Starting
    from shim.gritctl.stored import Stored

USABLE = ("Checkpointed", "Submitting", "Submitted")


def means(restore: Object, labels: dict[str, str], owners: Callable[[], set[str]]) -> bool:
    """Whether a pod of such labels and owners is one that the Restore asks for, by both if it names
    both. `owners` are uids."""
    spec = restore["spec"]
    owner, selector = (spec.get("ownerRef") or {}).get("uid", ""), spec.get("selector")
    if selector is not None and not selects(selector, labels):
        return False
    return owner in owners() if owner else selector is not None


def selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    """As Kubernetes' label selectors do."""
    wanted = selector.get("matchLabels") or {}
    if any(labels.get(key) != value for key, value in wanted.items()):
        return False
    return all(_holds(one, labels) for one in selector.get("matchExpressions") or [])


def _holds(expression: dict[str, Any], labels: dict[str, str]) -> bool:
    value, values = labels.get(expression["key"]), expression.get("values") or []
    match expression["operator"]:
        case "In":
            return value in values
        case "NotIn":
            return value not in values
        case "Exists":
            return value is not None
        case "DoesNotExist":
            return value is None
    return False


def unusable(name: str, checkpoint: Object | None) -> tuple[str, str] | None:
    """Reason and message if nothing can be restored from that Checkpoint, None if it can."""
    if checkpoint is None:
        return (
            "CheckpointNotFound",
            f"there is no Checkpoint {name}: kubectl get checkpoint tells their names",
        )
    phase = (checkpoint.get("status") or {}).get("phase")
    if phase not in USABLE or not checkpoint["status"].get("dataPath"):
        return (
            "CheckpointNotReady",
            f"the Checkpoint {name_of(checkpoint)} is {phase or 'new'}, and nothing can be "
            "restored from it before it is Checkpointed: kubectl wait for that",
        )
    if "deletionTimestamp" in checkpoint["metadata"]:
        return (
            "CheckpointDeleted",
            f"the Checkpoint {name_of(checkpoint)} is being deleted, and its files with it",
        )
    return None


def other_program(saved: Stored, starting: Starting) -> str:
    """How the container that is about to start differs from the one that was saved, as far as that
    was recorded; "" if it does not. Images are told by name, arguments by what would be run."""
    spec, _ = saved.document("spec.dump")
    notes = spec.get("annotations")
    image = text(notes.get("io.kubernetes.cri.image-name")) if isinstance(notes, dict) else ""
    arguments = arguments_of(spec)
    if arguments and arguments != starting.arguments:
        return (
            f"container {starting.name} of pod {starting.pod} runs {starting.arguments}, and the "
            f"one saved ran {arguments}"
        )
    if image and starting.image and not _same_image(image, starting.image):
        return (
            f"container {starting.name} of pod {starting.pod} is of the image {starting.image}, "
            f"and the one saved was of {image}"
        )
    return ""


def _same_image(one: str, other: str) -> bool:
    """Names that are digests, of two nodes, may well mean the same."""
    return one == other or any(name.startswith("sha256:") for name in (one, other))
