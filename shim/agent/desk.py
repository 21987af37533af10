"""The agent's half of what it and the shims tell each other (shim/intents.py): what is pending, who
asks, what they are answered, how restores ended."""

from __future__ import annotations

import json
import os

from shim import bundle, places
from shim.intents import ANSWER, OUTCOME, PENDING, QUESTION

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


class Desk:
    """All raise OSError."""

    def __init__(self, directory: str = places.INTENTS) -> None:
        self._directory = directory
        os.makedirs(directory, mode=0o700, exist_ok=True)

    def publish(self, wanted: set[tuple[str, str]], running: Callable[[], set[str]]) -> None:
        """Makes what is pending those (namespace, uid), and says that the agent lives. The pods
        that are `running` when a Restore becomes pending are kept with it."""
        names = {f"{namespace}.{uid}{PENDING}" for namespace, uid in wanted}
        there = self._names(PENDING)
        for name in there - names:
            self._remove(name)
        for name in names & there:
            os.utime(self._path(name))
        if names - there:
            before = json.dumps(sorted(running()))
            for name in names - there:
                bundle.replace(self._path(name), before, mode=0o600)

    def ran_before(self, uid: str) -> set[str]:
        """The pods that ran when that Restore became pending, by their uids."""
        for name in self._names(f".{uid}{PENDING}"):
            with open(self._path(name), encoding="utf-8") as file:
                return set(json.load(file))
        return set()

    def questions(self) -> set[str]:
        """The containers that wait for an answer."""
        return self._stems(QUESTION) - self._stems(ANSWER)

    def answer(self, container: str, answer: dict[str, Any]) -> None:
        bundle.replace(self._path(container + ANSWER), json.dumps(answer), mode=0o600)
        if container not in self._stems(QUESTION):  # it has given up meanwhile
            self._remove(container + ANSWER)

    def outcomes(self) -> dict[str, dict[str, Any]]:
        """What became of containers that were restored, by their ids."""
        found = {}
        for container in self._stems(OUTCOME):
            try:
                with open(self._path(container + OUTCOME), encoding="utf-8") as file:
                    found[container] = json.load(file)
            except (FileNotFoundError, ValueError):
                continue
        return found

    def forget(self, container: str) -> None:
        """The outcome was written down, or the question was a dead container's."""
        for kind in (QUESTION, OUTCOME):
            self._remove(container + kind)

    def _names(self, kind: str) -> set[str]:
        return {name for name in os.listdir(self._directory) if name.endswith(kind)}

    def _stems(self, kind: str) -> set[str]:
        return {name.removesuffix(kind) for name in self._names(kind)}

    def _remove(self, name: str) -> None:
        try:
            os.unlink(self._path(name))
        except FileNotFoundError:
            pass

    def _path(self, name: str) -> str:
        return os.path.join(self._directory, name)
