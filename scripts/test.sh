#!/usr/bin/env bash
# Every test: the long build of the control plane and the set-up of a real vLLM start first and run
# beside the quick tests.
# usage: test.sh VENV WORKERS [PYTEST ARGUMENT...]
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1 workers=$2
shift 2
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false

if [ -f tests/controlplane/binaries.py ]; then
  nice -n 5 "$venv/bin/python" tests/controlplane/binaries.py &
  build=$!
  trap 'kill $build 2>/dev/null || true' EXIT
fi
nice -n 5 "$venv/bin/python" scripts/vllm_setup.py >/dev/null &
"$venv/bin/python" -m pytest -n "$workers" --dist worksteal "$@"
