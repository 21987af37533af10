"""Root file systems of the Debian releases the shim must run on, made by mmdebstrap.

`python -m tests.nodes.roots` makes them all. Mirror, proxy and credentials are the host's
apt's, read when a root is made; none of them is named in this repository.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tests.nodes import cache

if TYPE_CHECKING:
    from pathlib import Path

PACKAGES = (
    "busybox-static",
    "ca-certificates",
    "containerd",
    "containernetworking-plugins",
    "criu",
    "iproute2",
    "iptables",
    "make",
    "nftables",
    "procps",
    "python3",
    "python3-cffi-backend",
    "python3-venv",
    "python3-xxhash",
    "runc",
)


@dataclass(frozen=True)
class Recipe:
    """What a root is made from; another recipe is another directory in the cache."""

    name: str
    suite: str
    packages: tuple[str, ...] = PACKAGES

    @property
    def path(self) -> Path:
        digest = cache.digest(self, _TRIM)
        return cache.directory() / "nodes" / f"{self.name}-{digest}"


# Documentation and translations are half the files of a small Debian.
_TRIM = tuple(
    f"path-exclude=/usr/share/{what}/*" for what in ("doc", "info", "locale", "man", "lintian")
)

RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("12", "bookworm"),  # containerd 1.6, runc 1.1.5; its CRIU fails on new kernels
        Recipe("13", "trixie", (*PACKAGES, "checkpointctl")),  # containerd 1.7, CRIU 4.1
        Recipe("forky", "forky", (*PACKAGES, "checkpointctl")),  # containerd 2.1, CRIU 4.2
    )
}


def root(name: str) -> Path:
    """The root file system of the node `name`, made now if the cache has none."""
    recipe = RECIPES[name]
    return cache.entry(recipe.path, lambda draft: _make(recipe, draft))


def old_containerd() -> Path:
    """Debian 12's containerd 1.6 and runc, as a layer to lie over root 13: there they find a CRIU
    that starts on current kernels."""
    source = RECIPES["12"].path
    path = cache.directory() / "nodes" / f"{source.name}-containerd-{cache.digest(_OLD)}"
    return cache.entry(path, _copy_old_containerd)


_OLD = (
    "usr/bin/containerd",
    "usr/bin/containerd-shim",
    "usr/bin/containerd-shim-runc-v1",
    "usr/bin/containerd-shim-runc-v2",
    "usr/bin/ctr",
    "usr/sbin/runc",
)
"""The programs of its packages containerd and runc; they are linked with nothing that is newer."""


def _copy_old_containerd(draft: Path) -> None:
    source = root("12")
    for name in _OLD:
        (draft / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / name, draft / name)


def _make(recipe: Recipe, target: Path) -> None:
    with tempfile.NamedTemporaryFile("w", suffix=".conf") as options:
        options.write("\n".join(_host_apt_options()))
        options.flush()
        command = [
            "mmdebstrap",
            "--quiet",
            "--mode=root",
            "--variant=apt",
            f"--aptopt={options.name}",
            '--aptopt=APT::Install-Recommends "false"',
            '--aptopt=Acquire::Languages "none"',
            # forky's index is past its date at times.
            '--aptopt=Acquire::Check-Valid-Until "false"',
            "--dpkgopt=force-unsafe-io",
            *(f"--dpkgopt={line}" for line in _TRIM),
            f"--include={','.join(recipe.packages)}",
            recipe.suite,
            str(target),
            _host_mirror(),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(
            f"mmdebstrap could not make the root of node {recipe.name} "
            f"(exit {done.returncode}):\n{shlex.join(command)}\n{done.stderr[-4000:]}"
        )


def _host_mirror() -> str:
    """Where the host's apt takes Debian itself from."""
    listing = subprocess.run(
        [
            "apt-get",
            "indextargets",
            "--format",
            "$(REPO_URI) $(CODENAME) $(ORIGIN) $(COMPONENT)",
            "Created-By: Packages",
        ],
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    for line in listing.splitlines():
        uri, *rest = line.split()
        # Updates and security archives have a "-" in their code name.
        if rest[1:] == ["Debian", "main"] and "-" not in rest[0]:
            return uri
    return "http://deb.debian.org/debian"


def _host_apt_options() -> list[str]:
    """How the host's apt reaches its mirror: proxies, certificates, credentials' files."""
    dump = subprocess.run(["apt-config", "dump"], capture_output=True, text=True, check=True)
    wanted = ("Acquire::http", "Acquire::https", "Acquire::Check-", "Acquire::Retries")
    options = [line for line in dump.stdout.splitlines() if line.startswith(wanted)]
    if os.path.isdir("/etc/apt/auth.conf.d"):
        options.append('Dir::Etc::netrcparts "/etc/apt/auth.conf.d";')
    return options


if __name__ == "__main__":
    for name in RECIPES:
        print(root(name))
