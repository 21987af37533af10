"""`python -m tests.nodes` makes all that the end-to-end tests take from the cache, so that no
test's time limit has to allow for it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from tests.nodes import agent_packages, apiserver, cuda_plugin, installed, roots


def make(name: str) -> None:
    roots.root(name)
    installed.layer(name)
    if name != "12":
        cuda_plugin.directory(name)
        agent_packages.directory(name)


with ThreadPoolExecutor() as pool:
    control_plane = pool.submit(apiserver.directory)
    list(pool.map(make, roots.RECIPES))
    control_plane.result()
roots.old_containerd()
