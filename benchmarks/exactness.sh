#!/usr/bin/env bash
# All checks of exact kernels and attention that need a GPU, in about ten minutes on one GPU.
#
#   benchmarks/exactness.sh [OUT_DIR]        # PYTHON=python3; OUT_DIR: benchmarks/results
#
# Needs PyTorch with Triton; vLLM for attention and for the comparison with its kernels; pytest and transformers for the
# tests. A part that fails does not stop the others; the last line counts them.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-python3} out=${1:-benchmarks/results} day=$(date +%F) failed=0

part() {
  echo "== $*"
  timeout 280 "$@" || { echo "== failed, exit code $?: $*"; failed=$((failed + 1)); }
}

part "$python" benchmarks/attention_rows.py --json "$out/attention-rows-$day.json"
part "$python" benchmarks/batch_invariant.py --json "$out/batch-invariant-$day.json"
# Not with this project's pytest settings, which name plugins that a GPU machine may lack.
part "$python" -m pytest -c /dev/null --rootdir . -q -ra --tb=short -p no:cacheprovider tests/gpu
echo "== $failed of 3 parts failed"
exit $((failed > 0))
