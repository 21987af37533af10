"""A machine with a real GPU as a node: a kit unpacked beside the system, a private containerd,
this tree's shim. Speaks the words of `tests.nodes.node.Node` that tests use, on the machine itself.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
HOME = Path("/opt/grit-gpu")
KIT = HOME / "kit"
STATE = Path("/run/grit-gpu")
SOCKET = STATE / "containerd.sock"
IMAGE = "docker.io/local/busybox:1"
GRIT = "io.containerd.grit.v1"
CONFIG = HOME / "grit.toml"

_CRIU = """\
#!/bin/sh
export LD_LIBRARY_PATH={release}/lib
exec {release}/bin/criu "$@"
"""


class Machine:
    """One containerd, with CRIU `criu` ("4.1" or "4.2") and grit under it."""

    def __init__(self, criu: str) -> None:
        self.release = KIT / f"criu-{criu}"
        self._containerd: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Machine:
        if not (HOME / "env/.ready").exists():
            _install()
        (HOME / "bin").mkdir(exist_ok=True)
        criu = HOME / "bin/criu"
        criu.write_text(_CRIU.format(release=self.release))
        criu.chmod(0o755)
        self.start_containerd()
        return self

    def __exit__(self, *error: object) -> None:
        if self._containerd:
            self._containerd.terminate()
            self._containerd.wait()

    @property
    def environment(self) -> dict[str, str]:
        path = [str(HOME / "bin"), str(KIT / "bin"), os.environ["PATH"]]
        libraries = [str(KIT / "lib"), os.environ.get("LD_LIBRARY_PATH", "")]
        return {
            **os.environ,
            "PATH": ":".join(path),
            "LD_LIBRARY_PATH": ":".join(filter(None, libraries)),
        }

    def run(
        self, argv: Sequence[str], *, check: bool = True, timeout: float = 120
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            list(map(str, argv)),
            check=False,
            capture_output=True,
            text=True,
            timeout=timeout,
            env=self.environment,
        )
        if check and done.returncode:
            raise AssertionError(f"{argv}: exit {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    def ctr(self, *words: str, **options: Any) -> subprocess.CompletedProcess[str]:
        return self.run(["ctr", "--address", str(SOCKET), *words], **options)

    def start_containerd(self, extra: Mapping[str, str] | None = None) -> None:
        STATE.mkdir(exist_ok=True)
        config = HOME / "config.toml"
        config.write_text(
            f'version = 2\nroot = "{HOME}/root"\nstate = "{STATE}/state"\n'
            'disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.nri.v1.nri",'
            ' "io.containerd.internal.v1.opt"]\n'
            f'[grpc]\naddress = "{SOCKET}"\n'
        )
        with open(HOME / "containerd.log", "ab") as log:
            self._containerd = subprocess.Popen(
                ["containerd", "--config", str(config)],
                env={**self.environment, **(extra or {})},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + 20
        while self.ctr("version", check=False).returncode:
            if self._containerd.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"containerd did not start:\n{self.log()[-4000:]}")
            time.sleep(0.05)
        if IMAGE not in self.ctr("images", "ls", "-q").stdout:
            self.ctr("images", "import", str(KIT / "busybox.tar"))

    def log(self) -> str:
        return (HOME / "containerd.log").read_text(errors="replace")

    def configure(self, text: str) -> None:
        """Writes grit.toml; `text` is what stands under [grit]."""
        CONFIG.write_text(f"[grit]\n{text}\n")


def _install() -> None:
    """The kit, and the shim in an environment of its own, as `make install` lays them out."""
    shutil.rmtree(HOME, ignore_errors=True)
    HOME.mkdir(parents=True)
    with tarfile.open(REPOSITORY / ".gpu/kit.tar.xz") as archive:
        archive.extractall(KIT, filter="tar")
    environment = HOME / "env"
    python = os.path.realpath(sys._base_executable)  # type: ignore[attr-defined]
    subprocess.run([python, "-m", "venv", "--without-pip", str(environment)], check=True)
    (packages,) = environment.glob("lib/python3*/site-packages")
    wheels = map(str, sorted((KIT / "wheels").iterdir()))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*pip, "--target", str(packages), *wheels], check=True)
    shutil.copytree(REPOSITORY / "shim", packages / "shim")
    sys.path.insert(0, str(REPOSITORY / "packaging"))
    import install

    install.write_launcher(
        KIT / "bin/containerd-shim-grit-v1", install.LAUNCHER, "shim.cli", packages
    )
    (environment / "libexec").mkdir()
    install.write_launcher(
        environment / "libexec/cuda-checkpoint",
        install.CRIU_LAUNCHER,
        "shim.cuda.command",
        packages,
    )
    (environment / ".ready").touch()
