"""`python -m shim` is `containerd-shim-grit-v1`, for trying the shim from a checkout."""

import sys

from shim.cli import main

sys.exit(main())
