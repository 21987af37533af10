"""`python -m tests.soak`: containers checkpointed, restored, paused and killed at random."""
