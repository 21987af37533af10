#!/usr/bin/python3
"""Tells containerd of the runtime `grit`, and takes that back: a marked block at the end of its
config.toml, nothing else.

    configure enable|disable [--config /etc/containerd/config.toml] [--containerd containerd]

A block and not a drop-in file: to containerd 1.x, a file under `imports` that names a plugin
replaces all that config.toml says of this plugin. The new file is shown to containerd's own parser
before it takes the old one's place; if that does not like it, nothing is changed. Disabled, the
file is what it was, to the byte. containerd must be restarted after either. Needs nothing but
Python's standard library.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
BEGIN = "\n# >>> containerd-shim-grit: kept by its `configure`; do not edit\n"
END = "# <<< containerd-shim-grit\n"
MADE = "# There was no such file before.\n"

# By the configuration's version: our example, and the plugin that has the runtimes.
EXAMPLES = {
    2: ("config-v2.toml", "io.containerd.grpc.v1.cri"),
    3: ("config-v3.toml", "io.containerd.cri.v1.runtime"),
}


class ConfigureError(Exception):
    """containerd's configuration was left as it is; the message says why."""


def main() -> int:
    parser = argparse.ArgumentParser(description="tell containerd of the runtime grit, or not")
    parser.add_argument("action", choices=["enable", "disable"])
    parser.add_argument("--config", type=Path, default=Path("/etc/containerd/config.toml"))
    parser.add_argument("--containerd", default="containerd", help="the program to ask")
    arguments = parser.parse_args()
    try:
        if arguments.action == "enable":
            said = enable(arguments.config, arguments.containerd)
        else:
            said = disable(arguments.config)
    except (ConfigureError, OSError) as error:
        print(f"configure: {error}", file=sys.stderr)
        return 1
    print(said)
    return 0


def enable(config: Path, containerd: str) -> str:
    """Adds the block, or renews it. Raises ConfigureError."""
    text = config.read_text() if config.exists() else ""
    old = without_block(text)
    whole = old
    if not config.exists() or MADE in text:
        whole = old or f"{MADE}version = {_default_version(containerd)}\n"
    settings = _parsed(whole, config)
    version = settings.get("version", 1)
    if version not in EXAMPLES:
        raise ConfigureError(
            f"{config} is of version {version}, and a runtime is told to versions "
            f"{' and '.join(map(str, EXAMPLES))}: see `containerd config migrate`"
        )
    example, plugin = EXAMPLES[version]
    if "grit" in _runtimes(settings, plugin):
        return f"{config} has a runtime grit of its own; left as it is"
    lines = _example(example)
    ours = lines[lines.index(f'[plugins."{plugin}".containerd.runtimes.grit]') :]
    new = whole + BEGIN + ours + END
    dump = _dumped(new, config, containerd)
    default = _cri(dump, plugin).get("default_runtime_name") or "runc"
    # containerd 1.6 forgets its own runc as soon as another runtime is named.
    if default not in _runtimes(dump, plugin) and default == "runc":
        new = whole + BEGIN + lines + END
        _dumped(new, config, containerd)
    if new == text:
        return f"{config} has the runtime grit"
    _replace(config, new)
    return f"added the runtime grit to {config}: restart containerd"


def disable(config: Path) -> str:
    """Takes the block away again; a file that `enable` made goes as a whole."""
    text = config.read_text() if config.exists() else ""
    old = without_block(text)
    if old == text:
        return f"{config} has no block of ours"
    if old.startswith(MADE):
        config.unlink()
    else:
        _replace(config, old)
    return f"took the runtime grit out of {config}: restart containerd"


def without_block(text: str) -> str:
    """Raises ConfigureError where a block begins and does not end."""
    before, begin, rest = text.partition(BEGIN)
    if not begin:
        return text
    _, end, after = rest.partition(END)
    if not end:
        raise ConfigureError(f"the block that begins with {BEGIN.strip()!r} does not end")
    return before + after


def _example(name: str) -> str:
    """What our example says of runtimes. It lies beside this program, installed or not."""
    text = (HERE / "containerd" / name).read_text()
    return text[text.index("[plugins.") :]


def _default_version(containerd: str) -> int:
    return int(_parsed(_run([containerd, "config", "default"]), Path(containerd))["version"])


def _dumped(text: str, config: Path, containerd: str) -> dict[str, Any]:
    """What containerd makes of it. Its relative imports are those of its own directory."""
    config.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=config.parent, suffix=".grit-new") as draft:
        draft.write(text)
        draft.flush()
        return _parsed(_run([containerd, "--config", draft.name, "config", "dump"]), config)


def _run(argv: list[str]) -> str:
    try:
        done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigureError(f"cannot ask containerd: {error}") from error
    if done.returncode:
        raise ConfigureError(f"containerd does not take it: {done.stderr.strip()}")
    return done.stdout


def _parsed(text: str, where: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigureError(f"{where}: {error}") from error


def _cri(settings: dict[str, Any], plugin: str) -> dict[str, Any]:
    found: dict[str, Any] = settings.get("plugins", {}).get(plugin, {}).get("containerd", {})
    return found


def _runtimes(settings: dict[str, Any], plugin: str) -> dict[str, Any]:
    found: dict[str, Any] = _cri(settings, plugin).get("runtimes", {})
    return found


def _replace(config: Path, text: str) -> None:
    """In one step, with the old one's mode."""
    draft = config.with_name(f".{config.name}.grit-new")
    draft.write_text(text)
    draft.chmod(config.stat().st_mode & 0o777 if config.exists() else 0o644)
    os.replace(draft, config)


if __name__ == "__main__":
    sys.exit(main())
