"""Puts the shim on this machine and takes it away: what `make install` and `uninstall` run.

Under PREFIX it makes a virtual environment of its own with the package and its
dependencies, and the commands as small scripts; under SYSCONFDIR an example configuration.
It never touches an existing grit.toml nor containerd's configuration. Needs nothing but
Python's standard library and `venv`.
"""

from __future__ import annotations

import argparse
import compileall
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[1]
NAME = "containerd-shim-grit"

SHIM = "containerd-shim-grit-v1"
CRIU_COMMAND = "cuda-checkpoint"

LAUNCHER = """\
#!@PYTHON@ -ISWignore
import sys

sys.path.append("@PACKAGES@")
from @MODULE@ import main

sys.exit(main())
"""

# runc starts CRIU with a directory as standard input, with which Python refuses to start.
CRIU_LAUNCHER = """\
#!/bin/sh
exec @PYTHON@ -ISWignore -c '
import sys

sys.path.append("@PACKAGES@")
from @MODULE@ import main

sys.exit(main())
' "$@" </dev/null
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="install or remove containerd-shim-grit")
    parser.add_argument("action", choices=["install", "uninstall"])
    parser.add_argument("--prefix", type=Path, default=Path("/usr/local"))
    parser.add_argument("--sysconfdir", type=Path, default=Path("/etc"))
    arguments = parser.parse_args()
    act = install if arguments.action == "install" else uninstall
    act(arguments.prefix.absolute(), arguments.sysconfdir.absolute())


def install(prefix: Path, sysconfdir: Path) -> None:
    """Installs, or replaces what an earlier call installed."""
    environment = prefix / "lib" / NAME
    draft = environment.with_name(f"{NAME}.new")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        make_environment(draft)
        shutil.rmtree(environment, ignore_errors=True)
        draft.rename(environment)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    packages = packages_of(environment)
    # Only now, so that tracebacks name the final path.
    compileall.compile_dir(str(packages), quiet=2, workers=0)
    for path, module in commands(prefix).items():
        if (packages / f"{module.replace('.', '/')}.py").exists():
            write_launcher(path, module, packages)
            print(f"installed {path}")
    example = sysconfdir / "containerd" / "grit.toml.example"
    example.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(SOURCE / "packaging/grit.toml", example)
    print(f"installed {example}")


def uninstall(prefix: Path, sysconfdir: Path) -> None:
    """Removes what `install` made; what is not there is no error. grit.toml stays."""
    environment = prefix / "lib" / NAME
    example = sysconfdir / "containerd" / "grit.toml.example"
    for path in (*commands(prefix), example):
        path.unlink(missing_ok=True)
    shutil.rmtree(environment, ignore_errors=True)
    print(f"removed {NAME} from {prefix}")


def commands(prefix: Path) -> dict[Path, str]:
    """The commands and the modules whose `main` they run."""
    return {
        prefix / "bin" / SHIM: "shim.cli",
        prefix / "bin/gritctl": "shim.gritctl.cli",
        # Not in anybody's PATH but CRIU's, and only where NVIDIA's is missing.
        prefix / "lib" / NAME / "libexec" / CRIU_COMMAND: "shim.cuda.command",
    }


def packages_of(environment: Path) -> Path:
    """The environment's site-packages."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    return environment / "lib" / version / "site-packages"


def make_environment(environment: Path) -> None:
    """A virtual environment holding the package; pip itself is not left in it."""
    environment.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    python = environment / "bin/python"
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "--quiet"]
    with tempfile.TemporaryDirectory() as build:
        # A build in the checkout would leave files there, and pick up those of the last one.
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            if (SOURCE / name).exists():
                shutil.copyfile(SOURCE / name, Path(build, name))
        without = shutil.ignore_patterns("__pycache__")
        shutil.copytree(SOURCE / "shim", Path(build, "shim"), ignore=without)
        subprocess.run([*pip, "install", "--no-compile", build], check=True)
    subprocess.run([*pip, "uninstall", "--yes", "pip"], check=True)


def launcher(name: str, module: str, python: str, packages: str) -> str:
    """The text of the command `name`, which runs `main` of `module`."""
    if name == SHIM:
        text = (SOURCE / f"packaging/{SHIM}.sh").read_text()
    else:
        text = CRIU_LAUNCHER if name == CRIU_COMMAND else LAUNCHER
    for word, value in (("PYTHON", python), ("PACKAGES", packages), ("MODULE", module)):
        text = text.replace(f"@{word}@", value)
    return text


def write_launcher(path: Path, module: str, packages: Path) -> None:
    """Writes the command `path`, replacing an older one in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    python = os.path.realpath(sys.executable)
    draft = path.with_name(f".{path.name}.new")
    draft.write_text(launcher(path.name, module, python, str(packages)))
    draft.chmod(0o755)
    draft.replace(path)


if __name__ == "__main__":
    main()
