"""CRIU's RPC as a library: the messages, two ways to reach CRIU, a container's dump request made
from runc's state, the dump itself with its notifications, errors in plain words, and a look into
images. It knows CRIU and runc's contract with it, and must never know containerd, the shim or a
GPU.
"""
