"""The documented launch command: ``python chatlearn/entrypoint.py grpo --config-file FILE key=value ...``."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    # Python puts the folder of a script first on its path, where our modules would hide packages of the same name.
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(folder for folder in sys.path if Path(folder).resolve() != here)]

    from chatlearn.cli import main

    sys.exit(main())
