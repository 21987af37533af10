"""Marks for tests of the simulated GPU that need only one of the nodes: what they prove depends on
no version of containerd, runc or CRIU, and on no kind of control group."""

from __future__ import annotations

import pytest

on_13 = pytest.mark.parametrize("gpu_node", ["13"], indirect=True)
on_forky = pytest.mark.parametrize("gpu_node", ["forky"], indirect=True)
