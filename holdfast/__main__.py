"""`python -m holdfast` is the `holdfast` command."""

from __future__ import annotations

import sys

from holdfast.cli.entry import main

if __name__ == "__main__":
    sys.exit(main())
