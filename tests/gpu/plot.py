"""`python -m tests.gpu.plot RESULTS... > docs/gpu-sizes.svg`: how a checkpoint grows with the GPU
memory in use, from the `results.jsonl` of runs of `test_sizes`.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from tests.bench import chart

PANELS = {
    "Checkpoint, the container goes on": "checkpoint",
    "The processes stand still": "frozen",
    "Restore": "restored",
}
SIDES = {"grit, driver engine": "driver", "CRIU's plugin": "plugin"}


def main() -> None:
    lines = [line for name in sys.argv[1:] for line in Path(name).read_text().splitlines()]
    sys.stdout.write(picture([json.loads(line) for line in lines]))


def picture(rows: list[dict[str, Any]]) -> str:
    found: dict[str, dict[float, dict[str, Any]]] = {}
    for row in rows:
        size = re.fullmatch(r"(\d+) MiB tensor", row.get("test", ""))
        if size:
            found.setdefault(row["engine"], {})[int(size[1]) / 1024] = row
    return chart.svg(
        {
            title: {
                side: [(size, [row[figure]]) for size, row in sorted(found[engine].items())]
                for side, engine in SIDES.items()
            }
            for title, figure in PANELS.items()
        }
    )


if __name__ == "__main__":
    main()
