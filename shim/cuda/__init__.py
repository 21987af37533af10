"""The CUDA side of a checkpoint: find the CUDA processes, take the GPU away, give it back.

`engine` is what the task layer calls; `driver` starts and talks to a `helper` process, the only
place (beside `command`, our own `cuda-checkpoint`) where libcuda is loaded; `discovery` reads
/proc. Nothing here knows of containers, tasks or ttrpc: callers pass host pids.
"""
