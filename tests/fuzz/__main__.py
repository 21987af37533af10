"""`make fuzz`: every target for its share of FUZZ_SECONDS, from the corpus kept here. What is found
is written to fuzz-findings/; says how many inputs were run, and ends with 1 if any was wrong."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.fuzz.targets import SCRATCH, TARGETS

CORPUS = Path(__file__).parent / "corpus"


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=180, help="for all targets together")
    parser.add_argument("--findings", type=Path, default=Path("fuzz-findings"))
    parser.add_argument("targets", nargs="*", default=list(TARGETS), metavar="TARGET")
    options = parser.parse_args()
    options.findings.mkdir(exist_ok=True)
    share = max(1, int(options.seconds / len(options.targets)))
    print(f"{share} s each\n\n| target | inputs | seconds | findings |\n|---|---|---|---|")
    wrong = 0
    for name in options.targets:
        inputs, seconds, found = fuzz(name, share, options.findings)
        print(f"| {name} | {inputs} | {seconds} | {found} |", flush=True)
        wrong += found
    return 1 if wrong else 0


def fuzz(name: str, seconds: int, findings: Path) -> tuple[int, int, int]:
    """Inputs run, seconds taken, findings written."""
    with tempfile.TemporaryDirectory(prefix="grit-fuzz-", dir="/dev/shm") as work:
        corpus = Path(work, "corpus")
        shutil.copytree(CORPUS / name, corpus)
        before = set(findings.iterdir())
        argv = [sys.executable, "-m", "tests.fuzz.one", name, str(corpus)]
        argv += [
            f"-max_total_time={seconds}",
            "-max_len=65536",
            "-timeout=20",
            "-rss_limit_mb=2048",
        ]
        argv += [f"-artifact_prefix={findings}/{name}-", "-print_final_stats=1"]
        log = findings / f"{name}.log"
        with open(log, "w") as file:
            env = {**os.environ, SCRATCH: work}
            subprocess.run(argv, check=False, stdout=file, stderr=file, env=env)
        text = log.read_text(errors="replace")
        found = set(findings.iterdir()) - before - {log}
        if not found:
            log.unlink()
    inputs = re.search(r"number_of_executed_units: +(\d+)", text)
    taken = re.search(r"Done \d+ runs in (\d+) second", text)
    return int(inputs[1]) if inputs else 0, int(taken[1]) if taken else 0, len(found)


if __name__ == "__main__":
    sys.exit(main())
