"""`python -m tests.fuzz.one TARGET [libFuzzer options]`: one target, under coverage of the shim."""

import sys

import atheris

with atheris.instrument_imports(include=["shim"]):
    from tests.fuzz.targets import TARGETS

if __name__ == "__main__":
    target = TARGETS[sys.argv.pop(1)]
    atheris.Setup(sys.argv, target)
    atheris.Fuzz()
