#!/usr/bin/env bash
# Installs as scripts/quickstart.sh does, plus the development tools; then every check and every test that needs no GPU
# and is not marked as long (scripts/soak.sh --what long).
# Stops at the first failure with its exit status.
#
#   bash scripts/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly BIN=.venv/bin
# Two workers, each with whole files: much of the time is spent in waiting for processes that start.
# The suite takes about 25 minutes on 2 cores, most of it whole runs, and is cut off after an hour; one test that hangs is cut off,
# with every thread's stack, after 5 minutes.
readonly SUITE_LIMIT_S=3600 TEST_LIMIT_S=300

step() {
    printf '\n== %s\n' "$1"
    shift
    "$@"
}

bash scripts/install.sh auto --dev
step "lint" "$BIN/ruff" check .
step "format" "$BIN/ruff" format --check .
step "import contracts" "$BIN/lint-imports" --no-cache
step "types" "$BIN/basedpyright"
step "docs/config.md follows the schema" "$BIN/python" -m chatlearn.config.describe --check docs/config.md
step "tests" timeout --signal=INT --kill-after=30 "$SUITE_LIMIT_S" \
    "$BIN/python" -m pytest -m "not gpu and not long" -n 2 --dist loadfile --timeout "$TEST_LIMIT_S" "$@"
