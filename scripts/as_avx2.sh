#!/usr/bin/env bash
# Run a command as if this CPU had AVX2 and nothing newer, as most laptops and many cloud machines do.
#
#   scripts/as_avx2.sh make icm ARGS="--runs_dir /tmp/avx2"
#   scripts/as_avx2.sh make test
#
# No library uses newer instructions: oneDNN, PyTorch's own kernels, MKL, OpenBLAS (numpy), and vLLM, which takes its AVX2
# build. So the type is float32, and results have the bits of such a CPU. Its clock, memory, caches and number of cores
# are not imitated, so times here do not predict times there.
set -euo pipefail

usage() { sed -n '2,/^set /{/^set /d; s/^# \{0,1\}//; p}' "$0"; }
[[ $# -gt 0 ]] || { echo "as_avx2: give a command to run; --help says more" >&2; exit 2; }
[[ $1 != -h && $1 != --help ]] || { usage; exit 0; }

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
export ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 OPENBLAS_CORETYPE=Haswell
# With a shared cache PyTorch 2.13 would use code for wider vectors, and compute wrong numbers.
export TORCHINDUCTOR_CACHE_DIR="${TMPDIR:-/tmp}/torchinductor_avx2_$(id -u)"
export PYTHONPATH="$here/avx2${PYTHONPATH:+:$PYTHONPATH}"
exec "$@"
