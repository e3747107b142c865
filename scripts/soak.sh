#!/usr/bin/env bash
# The long fault tests: kills and stops processes of real runs at random, and counts afterwards. 20 take about a quarter of an hour.
# Installs as scripts/quickstart.sh does, plus the development tools; writes benchmarks/results/soak.md.
#
#   bash scripts/soak.sh [--kills N] [--seed S] [--output FILE]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/install.sh auto --dev
exec .venv/bin/python tests/end_to_end/soak.py "$@"
