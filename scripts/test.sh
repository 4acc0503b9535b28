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

# Two processes, a file of tests each; then, alone, the tests that measure time. 5: none of them was asked for.
first=0 second=0
.venv/bin/python -m pytest --numprocesses 2 --dist loadfile --durations=20 -m "not alone" "$@" || first=$?
.venv/bin/python -m pytest -m alone "$@" || second=$?
for status in $first $second; do
    [ "$status" -eq 0 ] || [ "$status" -eq 5 ] || exit "$status"
done
[ $((first + second)) -ne 10 ] || exit 5

echo "test.sh: all checks passed in $((SECONDS / 60)) min $((SECONDS % 60)) s"
