"""A control plane for the session; its nodes are made by those who need them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.e2e.kube.control_plane import ControlPlane

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="session")
def plane() -> Iterator[ControlPlane]:
    with ControlPlane() as plane:
        yield plane


@pytest.fixture(scope="session")
def resources(plane: ControlPlane) -> ControlPlane:
    """The control plane, with the resources that are packaged."""
    plane.apply_packaged()
    return plane
