#!/bin/sh
# Adds atheris to the virtual environment, with which the fuzz tests are guided by coverage: setup-fuzz.sh VENV
#
# There are wheels for some Pythons alone; elsewhere the fuzz tests do without, and this says so.
set -eu
cd "$(dirname "$0")/.."

venv=$1
"$venv/bin/python" -c 'import atheris' 2>/dev/null && exit 0
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --only-binary :all: --require-hashes -r requirements/fuzz.txt 2>/dev/null ||
    echo "setup: there is no atheris for this Python; what is fuzzed is guided by no coverage"
