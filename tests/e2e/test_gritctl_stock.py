"""gritctl and a container that the stock shim runs: refused after the fact, and undone; suspended
and resumed as ctr does it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.e2e.gpu import IMAGE, until
from tests.e2e.test_gritctl_stored import gritctl

if TYPE_CHECKING:
    from tests.nodes.node import Node


def test_a_container_of_the_stock_shim(node: Node) -> None:
    node.run_container("plain", IMAGE, "sleep", "1000")
    try:
        text = gritctl(node, "checkpoint", "plain", "--to", "/var/lib/checkpoints/p", status=1)
        assert "container plain does not run under grit: its images have no manifest" in text
        assert "no checkpoint was made, and plain runs on" in text
        assert list(node.path("/var/lib/checkpoints").iterdir()) == []
        assert "RUNNING" in node.ctr("task", "ls").stdout
        gritctl(node, "suspend", "plain")
        assert "PAUSED" in node.ctr("task", "ls").stdout
        gritctl(node, "resume", "plain")
    finally:
        node.ctr("task", "kill", "--signal", "SIGKILL", "plain", check=False)
        until("its end", lambda: "STOPPED" in node.ctr("task", "ls").stdout)
        node.ctr("task", "delete", "plain")
        node.ctr("container", "delete", "plain")
