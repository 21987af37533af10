"""`make matrix`: every fault at every phase of a checkpoint and of a restore."""
