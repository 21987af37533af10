"""The agent as it is, but for one thing: it stops (SIGSTOP) when it comes to the function that the
variable HOLD names, `module:Class.function`; so a test can kill it just there. Runs in a node."""

import functools
import importlib
import os
import signal

from shim.agent.__main__ import main

module, _, name = os.environ["HOLD"].partition(":")
*path, last = name.split(".")
owner = functools.reduce(getattr, path, importlib.import_module(module))
function = getattr(owner, last)


def held(*words: object, **options: object) -> object:
    os.kill(os.getpid(), signal.SIGSTOP)
    return function(*words, **options)


setattr(owner, last, held)
main()
