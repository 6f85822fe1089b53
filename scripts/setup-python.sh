#!/bin/sh
# Makes the virtual environment that everything here runs in: setup-python.sh PYTHON VENV
#
# The packages are pinned with their hashes in requirements/dev.txt; the index they come from is the user's own setting.
set -eu
cd "$(dirname "$0")/.."

python=$1
venv=$2
stamp=$venv/.ovms-stamp

"$python" - <<'CHECK' || exit 1
import sys
if sys.version_info < (3, 11):
    sys.exit(f"ovms needs Python 3.11 or newer; this is {sys.version.split()[0]}. Name another: make PYTHON=python3.12")
CHECK

wanted=$(cat requirements/dev.txt pyproject.toml | sha256sum)" $("$python" -V) $PWD"
[ -e "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && exit 0

mkdir -p .cache
exec 9>.cache/setup-python.lock
flock 9
# another make may have done it while we waited
[ -e "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && exit 0

echo "setup: making $venv with the packages of requirements/dev.txt"
rm -f "$stamp"
[ -x "$venv/bin/python" ] && "$venv/bin/python" -m pip --version >/dev/null 2>&1 || "$python" -m venv --clear "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/dev.txt
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
printf '%s' "$wanted" >"$stamp"
