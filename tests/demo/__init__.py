"""`make demo`: a GPU container checkpointed by stock containerd, killed and restored."""
