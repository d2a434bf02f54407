#!/usr/bin/env bash
# Every test. What takes minutes the first time (the control plane's build, a real vLLM, other
# people's clients) starts beside the quick tests; the tests that need it wait for it under its lock, and say why it failed.
# usage: test.sh VENV WORKERS [PYTEST ARGUMENT...]
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1 workers=$2
shift 2
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false

groups=()
trap 'for group in "${groups[@]}"; do kill -- "-$group" 2>/dev/null || true; done' EXIT
if [ $# -eq 0 ]; then # chosen tests set up what they need by themselves
  set -m # a process group each, so that what they started ends with them
  nice -n 5 "$venv/bin/python" tests/controlplane/binaries.py & groups+=($!)
  nice -n 5 "$venv/bin/python" scripts/vllm_setup.py >/dev/null & groups+=($!)
  nice -n 5 "$venv/bin/python" scripts/clients_setup.py >/dev/null & groups+=($!)
  nice -n 5 "$venv/bin/python" scripts/envoy_setup.py >/dev/null & groups+=($!)
  set +m
fi
"$venv/bin/python" -m pytest -n "$workers" --dist worksteal "$@"
