#!/usr/bin/env bash
# Writes docker/*.txt: what each image installs, version by version as constraints.txt says, with the
# hashes of the files. Run it after pyproject.toml or constraints.txt changed; a test compares them.
set -euo pipefail
cd "$(dirname "$0")/.."
version=0.13.9
home=${XDG_CACHE_HOME:-$HOME/.cache}/tandem/uv-$version
if [ ! -x "$home/bin/uv" ]; then
  python3 -m venv "$home"
  "$home/bin/python" -m pip install -q --disable-pip-version-check "uv==$version"
fi
compile() {
  "$home/bin/uv" pip compile -q --no-header --no-annotate --generate-hashes --universal \
    --python-version 3.12 -c constraints.txt "$@"
}
compile --extra operator pyproject.toml -o docker/operator.txt
compile --extra router --extra gateway --extra otel pyproject.toml -o docker/router.txt
compile --extra worker --extra otel pyproject.toml -o docker/worker.txt
printf 'hatchling\npip\n' | compile - -o docker/build.txt
