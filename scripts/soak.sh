#!/usr/bin/env bash
# The long fault tests: kills and stops processes of real runs at random, and counts afterwards.
# Installs as scripts/quickstart.sh does, plus the development tools; writes a table into benchmarks/results.
#
#   bash scripts/soak.sh [--what WHAT] [--kills N] [--seed S] [--output FILE]
#   bash scripts/soak.sh --what long
#
# --what engines (the default): engines and graders, which are replaced. 20 take about a quarter of an hour; soak.md.
# --what checkpoints: the driver and the ranks of the trainer, many of them inside a save, each followed by the same
#   command; the end is compared to the bit with a run that nobody disturbed. 50 take about an hour; soak_checkpoints.md.
# --what long: the tests that take too long for scripts/test.sh, such as a resume after every episode.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/install.sh auto --dev
if [[ "$*" == "--what long" ]]; then
    exec .venv/bin/python -m pytest -m long
fi
exec .venv/bin/python tests/end_to_end/soak.py "$@"
