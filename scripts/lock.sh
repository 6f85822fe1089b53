#!/bin/sh
# Pins the newest Python packages that pyproject.toml admits, with their hashes, into requirements/. Needs uv.
# The files name no index: where packages come from is the user's own setting.
set -eu
cd "$(dirname "$0")/.."
common="--universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --no-annotate --quiet --upgrade"
build=$(mktemp)
audit=$(mktemp)
trap 'rm -f "$build" "$audit"' EXIT
echo 'pip-audit >=2.10,<3' >"$audit"
echo 'flit_core >=3.9,<4' >"$build"
# shellcheck disable=SC2086
uv pip compile pyproject.toml $common -o requirements/run.txt
# shellcheck disable=SC2086
uv pip compile pyproject.toml "$build" --group dev $common -o requirements/dev.txt
# shellcheck disable=SC2086
uv pip compile "$audit" $common -o requirements/audit.txt
# by itself: nothing else needs it. The last version with a wheel for Python 3.11
echo 'atheris ==3.0.0' >"$build"
# shellcheck disable=SC2086
uv pip compile "$build" $common -o requirements/fuzz.txt
