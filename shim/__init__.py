"""containerd-shim-grit-v1: checkpoint and restore of GPU containers on a stock containerd."""

__version__ = "0.1.0"
