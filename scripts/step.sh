#!/usr/bin/env bash
# Run one set-up step with a line of progress instead of its output; show the output if it fails.
#
#   scripts/step.sh "installing vLLM" pip install ...
#   scripts/step.sh --may-fail "looking here first" pip install ...      # does not show the output if it fails
#
# On a terminal the seconds count up in place, elsewhere a line appears at the start and at the end.
set -euo pipefail

lines=30
if [[ $1 == --may-fail ]]; then
  lines=0
  shift
fi
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
  if ((lines == 0)); then
    echo "  ${what}: no, after ${SECONDS} s" >&2
  else
    echo "  ${what}: failed after ${SECONDS} s (exit ${status})" >&2
  fi
  tail -n "$lines" "$log" >&2
fi
exit "$status"
