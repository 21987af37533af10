"""`gritctl`, what an operator types: one file per subcommand, and `cli` that finds them.

Works on checkpoint directories and on containerd's gRPC API. The shim itself must never import
anything of it: here are click, rich and grpcio, which cost more than a shim may.
"""
