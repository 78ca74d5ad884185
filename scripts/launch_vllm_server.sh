#!/usr/bin/env bash
# Start a vLLM server with the settings of configs/vllm_config.yaml.
#
#   scripts/launch_vllm_server.sh {405B|70B|8B|local|PATH_OR_HF_ID} [--port P] [--host H] [--print] \
#       [--deterministic | --no-deterministic] [VLLM_OPTION ...]
#
# It listens on 127.0.0.1 port 8000 by default; every other option goes to vLLM and replaces the configured one.
# --deterministic (the default) makes a score depend only on its prompt, --no-deterministic uses vLLM's own kernels;
# scripts/test_determinism.py checks a server for that. --print shows the command instead of running it. The server
# replaces this script's process, so it gets the signals sent to it. PYTHON chooses the interpreter that
# has vLLM (default: .venv here, else python3). Exit code 2: it could not start, one line says why.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)

usage() { sed -n '2,/^set /{/^set /d; s/^# \{0,1\}//; p}' "${BASH_SOURCE[0]}"; }

print_only=false
arguments=()
for argument in "$@"; do
  case $argument in
    --print) print_only=true ;;
    -h | --help) usage; exit 0 ;;
    *) arguments+=("$argument") ;;
  esac
done

python=${PYTHON:-}
[[ -n $python ]] || { [[ -x $root/.venv/bin/python ]] && python=$root/.venv/bin/python || python=python3; }
command -v "$python" >/dev/null || { echo "launch_vllm_server: there is no ${python}: run 'make setup' first" >&2; exit 2; }
"$python" -c 'import yaml' 2>/dev/null ||
  { echo "launch_vllm_server: ${python} has no PyYAML: run 'make setup' first, or name another with PYTHON=" >&2; exit 2; }

# Behind all else, as the size comes first.
if $print_only && ((${#arguments[@]})); then arguments+=(--print); fi
line=$("$python" "$root/scripts/vllm_command.py" ${arguments[@]+"${arguments[@]}"}) || exit 2
if $print_only; then
  echo "$line"
  exit 0
fi

# Its modules are compiled once and kept, even if the caller forbids it: otherwise every start takes far longer.
unset PYTHONDONTWRITEBYTECODE
echo "$line" >&2
eval "exec $line" # quoted by shlex.join
