#!/usr/bin/env bash
# Packs the chart into dist/ and, where a registry is named, pushes it there as an OCI artifact.
# usage: chart.sh [oci://REGISTRY/PATH [HELM PUSH OPTION...]]
# HELM names another helm than the PATH's; `helm registry login REGISTRY` comes first where one asks.
set -euo pipefail
cd "$(dirname "$0")/.."
helm=${HELM:-$(command -v helm || true)}
if [ -z "$helm" ]; then # the one that tests build, where they have
  helm=$(python3 tests/controlplane/binaries.py --print-dir --kubernetes 1.36)/helm
fi
if [ ! -x "$helm" ]; then
  echo "chart: no helm found; install Helm 3.8 or newer, or name it in HELM" >&2
  exit 1
fi
mkdir -p dist
said=$("$helm" package charts/tandem --destination dist)
archive=${said##* }
echo "chart: $archive"
if [ $# -gt 0 ]; then
  target=$1
  shift
  case $target in
  oci://*) ;;
  *)
    echo "chart: $target is no OCI registry; write oci://REGISTRY/PATH" >&2
    exit 1
    ;;
  esac
  "$helm" push "$archive" "$target" "$@"
  echo "chart: helm install tandem $target/tandem --version ${archive##*/tandem-}" | sed 's/\.tgz$//'
fi
