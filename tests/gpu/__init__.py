"""The same jobs on a real NVIDIA GPU: what travels to the machine, and what is run there."""
