"""``python -m chatlearn``: the same as the ``chatlearn`` command."""

from __future__ import annotations

import sys

from chatlearn.cli import main

if __name__ == "__main__":
    sys.exit(main())
