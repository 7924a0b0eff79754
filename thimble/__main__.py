"""``python -m thimble`` is the command ``thimble``."""

from __future__ import annotations

import sys

from thimble.cli import main

if __name__ == "__main__":
    sys.exit(main())
