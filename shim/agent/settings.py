"""The agent's configuration; what the keys mean is told in the package's docstring."""

from __future__ import annotations

import os
import tomllib
from dataclasses import dataclass, field, fields

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

PATH = "/etc/grit/agent.toml"


class SettingsError(Exception):
    """A configuration that cannot be used; says which key and what it has to be."""


class UnknownStore(Exception):
    """A Checkpoint names a claim that this agent has no directory for."""


@dataclass
class Settings:
    """Times are in seconds; directories are absolute."""

    node: str
    root: str = "/mnt/grit-agent"
    workers: int = 4
    lease_seconds: float = 30
    pod_wait_seconds: float = 60
    orphan_seconds: float = 300
    restore_seconds: float = 600
    stores: dict[str, str] = field(default_factory=dict)

    def directory(self, one: dict[str, Any]) -> str:
        """Where the files of a Checkpoint belong. Raises UnknownStore."""
        claim = (one["spec"].get("volumeClaim") or {}).get("claimName", "")
        if claim and claim not in self.stores:
            known = ", ".join(sorted(self.stores)) or "none"
            raise UnknownStore(
                f"the volumeClaim {claim} is no store of the agent on node {self.node}, which has "
                f"{known}: add it under [stores] in the agent's configuration and mount it there"
            )
        meta = one["metadata"]
        root = self.stores[claim] if claim else self.root
        return os.path.join(root, meta["namespace"], meta["name"])

    def holds(self, directory: str) -> bool:
        """Whether a directory named in a status, which others may write, is below a store."""
        if not directory:
            return False
        real = os.path.realpath(directory)
        places = map(os.path.realpath, [self.root, *self.stores.values()])
        return any(real.startswith(f"{place.rstrip('/')}/") for place in places)


def load(path: str, node: str) -> Settings:
    """Raises SettingsError. A file that is not there means the defaults, if it is the usual one."""
    try:
        with open(path, "rb") as file:
            found = tomllib.load(file)
    except FileNotFoundError:
        if path == PATH:
            return Settings(node)
        raise SettingsError(f"{path}: there is no such file") from None
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise SettingsError(f"{path}: {error}") from error
    known = {one.name for one in fields(Settings)} - {"node"}
    for key, value in found.items():
        if key not in known:
            raise SettingsError(f"{path}: unknown key {key}; known are {', '.join(sorted(known))}")
        if key == "stores":
            if not isinstance(value, dict) or not all(map(_absolute, value.values())):
                raise SettingsError(f"{path}: stores has to map claim names to absolute paths")
        elif key == "root":
            if not _absolute(value):
                raise SettingsError(f"{path}: root has to be an absolute path")
        elif isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise SettingsError(f"{path}: {key} has to be a number above 0")
    if not isinstance(found.get("workers", 1), int):
        raise SettingsError(f"{path}: workers has to be a whole number")
    return Settings(node, **found)


def _absolute(path: object) -> bool:
    return isinstance(path, str) and os.path.isabs(path)
