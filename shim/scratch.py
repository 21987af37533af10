"""Where an encrypted checkpoint lies in the clear while it is restored, and that it goes again.

`grit-scratch` in the bundle is that directory, or a link to it where `scratch_dir` says so: whoever
finds the daemon dead finds it there, and containerd removes a bundle with all in it.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from shim.container import Container

NAME = "grit-scratch"


def make(container: Container) -> str:
    """An empty directory for the container's images, root's alone. Raises OSError."""
    remove(container.bundle)
    path = os.path.join(container.bundle, NAME)
    if container.config.scratch_dir:
        # No id and no namespace has a "+" in it.
        base = f"grit-{container.namespace}+{container.id}"
        target = os.path.join(container.config.scratch_dir, base)
        _remove_tree(target)  # of one that was killed, bundle and all
        os.symlink(target, path)
        path = target
    os.mkdir(path, 0o700)
    return path


def remove(bundle: str) -> None:
    """Nothing, if there is none. Raises OSError."""
    path = os.path.join(bundle, NAME)
    if os.path.islink(path):
        _remove_tree(os.readlink(path))
        os.unlink(path)
    else:
        _remove_tree(path)


def _remove_tree(path: str) -> None:
    if os.path.lexists(path):
        import shutil

        shutil.rmtree(path)
