#!/usr/bin/env bash
# Sets up if needed, then runs the linter and all tests. Arguments go to pytest:
#
#   bash scripts/test.sh [--slow] [-k NAME] [tests/test_configs.py] ...
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/setup.sh
SECONDS=0

.venv/bin/python -m ruff check .
.venv/bin/python -m ruff format --check .
.venv/bin/python -m pytest --durations=20 "$@"

echo "test.sh: all checks passed in $((SECONDS / 60)) min $((SECONDS % 60)) s"
