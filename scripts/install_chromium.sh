#!/usr/bin/env bash
# Make sure that there is a Chromium for the tests of HTML pages: where there is none, install Debian's, if permitted.
#
#   scripts/install_chromium.sh      # exit code 1 and one line if there is still none
set -euo pipefail

for name in "${ICM_TEST_CHROMIUM:-}" chromium-headless-shell chromium chromium-browser google-chrome google-chrome-stable; do
  if [[ -n $name ]] && command -v "$name" >/dev/null; then
    exit 0
  fi
done
here=$(dirname "$0")
if [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null; then
  export DEBIAN_FRONTEND=noninteractive
  "$here/step.sh" "asking Debian for its packages" timeout 120 apt-get update -qq
  "$here/step.sh" "installing Chromium" \
    timeout 300 apt-get install -y -qq --no-install-recommends chromium-headless-shell fonts-dejavu-core
  exit 0
fi
echo "No Chromium here: install one (on Debian: apt install chromium), or name it in ICM_TEST_CHROMIUM" >&2
exit 1
