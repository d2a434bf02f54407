#!/usr/bin/env bash
# Makes .venv hold everything that Tandem, its demo and its tests need. Running it again costs nothing.
# usage: setup.sh PYTHON VENV EXTRAS
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1 venv=$2 extras=$3

fail() { printf 'setup: %s\n' "$1" >&2; exit 1; }

command -v "$python" >/dev/null 2>&1 \
  || fail "'$python' was not found; install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
  || fail "'$python' is $("$python" -V 2>&1); Tandem needs Python 3.11 or newer: make PYTHON=/path/to/python3.11"
"$python" -c 'import ensurepip, venv' 2>/dev/null \
  || fail "'$python' cannot make virtual environments; on Debian and Ubuntu: apt-get install python3-venv"

wanted=$(cat pyproject.toml constraints.txt scripts/setup.sh | cksum)-$extras-$("$python" -V)-$PWD
stamp=$venv/.tandem-installed
[ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && exit 0

free_kib=$(df -Pk . | awk 'NR == 2 {print $4}')
[ -x "$venv/bin/python" ] || [ "$free_kib" -gt 9000000 ] \
  || fail "only $((free_kib / 1024 / 1024)) GiB are free here and the installation needs 9 (torch with its CUDA libraries); free some, or check out elsewhere"

echo "setup: installing Tandem and its dependencies into $venv (two to ten minutes the first time)"
rm -f "$stamp"
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv" || fail "could not create $venv; remove it and run this again"
"$venv/bin/python" -m pip install --disable-pip-version-check -q --upgrade "$(grep '^pip==' constraints.txt)" \
  || fail "pip could not be upgraded; is a Python package index reachable?"
heartbeat() { local began=$SECONDS; while sleep 15; do echo "setup: still installing, $((SECONDS - began)) s"; done; }
heartbeat & beat=$!
trap 'kill $beat 2>/dev/null || true' EXIT
"$venv/bin/python" -m pip install --disable-pip-version-check -q -c constraints.txt \
  --build-constraint constraints.txt -e ".[$extras]" \
  || fail "the installation failed (see above); once the cause is gone, run the same command again"
printf '%s' "$wanted" >"$stamp"
echo "setup: done"
