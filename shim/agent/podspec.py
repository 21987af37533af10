"""What of a pod's specification its successor has to share: processes saved in the one find in the
other what they were started with.

That is what its containers run and have around them, not where and how the pod is run: what the
API server and the scheduler fill in, limits of CPU and memory, probes, tolerations and the service
account's token may differ. So may containers that were not saved.
"""

from __future__ import annotations

import hashlib
import json

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

_POD = (
    "hostIPC",
    "hostNetwork",
    "hostPID",
    "securityContext",
    "serviceAccountName",
    "shareProcessNamespace",
)
_CONTAINER = (
    "args",
    "command",
    "env",
    "envFrom",
    "image",
    "securityContext",
    "tty",
    "volumeDevices",
    "workingDir",
)
_TOKEN = "/var/run/secrets/kubernetes.io/serviceaccount"
"""Admission mounts a volume of a random name there."""


def parts(spec: dict[str, Any]) -> dict[str, str]:
    """A hash of each part that has to be shared: of the pod by the field's name, of a container by
    `<container>/<field>`. Values may be secrets, and are not kept."""
    found = {field: _hash(spec[field]) for field in _POD if spec.get(field)}
    if spec.get("hostUsers") is False:  # of all others, false is what is not said
        found["hostUsers"] = _hash(False)
    volumes = {one["name"]: one for one in spec.get("volumes") or []}
    for container in _containers(spec):
        of_container = {field: container.get(field) for field in _CONTAINER}
        of_container["devices"] = _devices(container.get("resources") or {})
        of_container["volumeMounts"] = _mounts(container, volumes)
        for field, value in of_container.items():
            if value:
                found[f"{container['name']}/{field}"] = _hash(value)
    return found


def digest(found: dict[str, str]) -> str:
    """One hash of all `parts`."""
    return _hash(found)


def differences(saved: dict[str, str], found: dict[str, str]) -> str:
    """In which parts a pod differs from the one that was saved, in words; "" if in none."""
    here = {_container_of(part) for part in found}
    there = {_container_of(part) for part in saved}
    missing = sorted(there - here - {""})
    told = [f"has no container {name}" for name in missing]
    differing = [
        part
        for part in sorted(saved.keys() | found.keys())
        if _container_of(part) in (here & there) | {""} and saved.get(part) != found.get(part)
    ]
    if differing:
        told.append(f"differs in {', '.join(map(_in_words, differing))}")
    return " and ".join(told)


def _containers(spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Those that run beside each other; the others among the init containers have ended."""
    yield from spec.get("containers") or []
    for one in spec.get("initContainers") or []:
        if one.get("restartPolicy") == "Always":
            yield one


def _devices(resources: dict[str, Any]) -> dict[str, Any]:
    """Extended resources, as nvidia.com/gpu, and claims of devices."""
    limits = resources.get("limits") or {}
    found = {name: str(count) for name, count in limits.items() if "/" in name}
    claims = resources.get("claims")
    return {**found, "claims": claims} if claims else found


def _mounts(container: dict[str, Any], volumes: dict[str, dict[str, Any]]) -> list[Any]:
    """Each with its volume. A volume's name is nobody's but the manifest's."""
    return [
        [_nameless(one), _nameless(volumes.get(one["name"], {}))]
        for one in container.get("volumeMounts") or []
        if one["mountPath"] != _TOKEN
    ]


def _nameless(one: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in one.items() if key != "name"}


def _container_of(part: str) -> str:
    """Its container's name, "" for a part of the pod."""
    return part.rpartition("/")[0]


def _in_words(part: str) -> str:
    name = _container_of(part)
    return f"{part.rpartition('/')[2]} of container {name}" if name else part


def _hash(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
