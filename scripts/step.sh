#!/usr/bin/env bash
# Run one set-up step with a line of progress instead of its output; show the output if it fails.
#
#   scripts/step.sh "installing vLLM" pip install ...
#
# On a terminal the seconds count up in place, elsewhere a line appears at the start and at the end.
set -euo pipefail

what=$1
shift
log=$(mktemp)
trap 'rm -f "$log"' EXIT

[[ -t 2 ]] || echo "  ${what} ..." >&2
"$@" >"$log" 2>&1 </dev/null &
job=$!
trap 'kill "$job" 2>/dev/null || true; exit 130' INT TERM

SECONDS=0
while kill -0 "$job" 2>/dev/null; do
  [[ -t 2 ]] && printf '\r  %s ... %d s ' "$what" "$SECONDS" >&2
  sleep 0.2
done

status=0
wait "$job" || status=$?
[[ -t 2 ]] && printf '\r\033[K' >&2
if ((status == 0)); then
  echo "  ${what}: done in ${SECONDS} s" >&2
else
  echo "  ${what}: failed after ${SECONDS} s (exit ${status})" >&2
  tail -n 30 "$log" >&2
fi
exit "$status"
