#!/bin/sh
# Builds the wheel and the source archive of the last commit: build-wheel.sh PYTHON DIRECTORY
#
# The same commit gives the same bytes, wherever and whenever it is built: of its files alone, with its time.
# PYTHON has flit_core, as the one of requirements/dev.txt does.
set -eu
python=$1
mkdir -p "$2"
out=$(cd "$2" && pwd)
cd "$(dirname "$0")/.."

if [ -n "$(git status --porcelain --untracked-files=no)" ]; then
    echo "wheel: what is not committed is not in it" >&2
fi
SOURCE_DATE_EPOCH=$(git log -1 --format=%ct)
export SOURCE_DATE_EPOCH
files=$(mktemp -d)
trap 'rm -rf "$files"' EXIT
git archive HEAD | tar -x -C "$files"
cd "$files"
OUT=$out "$python" - <<'BUILD'
import os
from flit_core import buildapi
for build in (buildapi.build_wheel, buildapi.build_sdist):
    print(os.path.join(os.environ["OUT"], build(os.environ["OUT"])))
BUILD
