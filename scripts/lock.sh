#!/bin/sh
# Pins the newest Python packages that pyproject.toml admits, with their hashes, into requirements/. Needs uv.
# The files name no index: where packages come from is the user's own setting.
set -eu
cd "$(dirname "$0")/.."
common="--universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --no-annotate --quiet --upgrade"
build=$(mktemp)
trap 'rm -f "$build"' EXIT
echo 'flit_core >=3.9,<4' >"$build"
# shellcheck disable=SC2086
uv pip compile pyproject.toml $common -o requirements/run.txt
# shellcheck disable=SC2086
uv pip compile pyproject.toml "$build" --group dev $common -o requirements/dev.txt
# by itself: nothing else needs it. The last version with a wheel for Python 3.11
echo 'atheris ==3.0.0' >"$build"
# shellcheck disable=SC2086
uv pip compile "$build" $common -o requirements/fuzz.txt
