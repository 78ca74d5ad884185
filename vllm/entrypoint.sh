#!/usr/bin/env bash
# What the container runs: a vLLM server with the settings of configs/vllm_config.yaml. Runs outside of it too:
#
#   VLLM_MODEL=local VLLM_PORT=8000 vllm/entrypoint.sh [VLLM_OPTION ...]
#
# VLLM_MODEL      405B, 70B, 8B, local, a folder, or a Hugging Face id (default: 8B)
# VLLM_PORT       where it listens (default: 8000)
# VLLM_HOST       on which address (default: 0.0.0.0, since a container's own loopback is reached by nobody)
# MAX_MODEL_LEN   longest prompt and answer together, tokens (default: as configured for the size)
# HF_TOKEN, VLLM_API_KEY   read by vLLM from the environment; as arguments every user of the machine could see them
set -euo pipefail

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
root=$here
[[ -d $root/scripts ]] || root=$(dirname -- "$here") # in the repository this file lies one level deeper

model=${VLLM_MODEL:-8B}
port=${VLLM_PORT:-8000}
host=${VLLM_HOST:-0.0.0.0}
options=()
if [[ -n ${MAX_MODEL_LEN:-} ]]; then
  [[ $MAX_MODEL_LEN =~ ^[1-9][0-9]*$ ]] ||
    { echo "entrypoint: MAX_MODEL_LEN=${MAX_MODEL_LEN}: expected a number of tokens" >&2; exit 2; }
  options+=(--max-model-len "$MAX_MODEL_LEN")
fi

# vLLM has a VLLM_PORT of its own, for its processes among themselves: left set, they would take the server's.
# In Kubernetes a Service named `vllm` sets it to a URL, and vLLM refuses to start.
unset VLLM_PORT VLLM_HOST VLLM_MODEL
# An empty setting is none: vLLM would ask for the key "", and Hugging Face would refuse the token.
[[ -n ${VLLM_API_KEY:-} ]] || unset VLLM_API_KEY
[[ -n ${HF_TOKEN:-} ]] || unset HF_TOKEN

[[ $host == 127.* || $host == localhost || -n ${VLLM_API_KEY:-} ]] ||
  echo "entrypoint: no VLLM_API_KEY: whoever reaches port ${port} may use the model" >&2

exec "$root/scripts/launch_vllm_server.sh" "$model" --host "$host" --port "$port" \
  ${options[@]+"${options[@]}"} "$@"
