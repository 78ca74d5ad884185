#!/usr/bin/env python3
"""The job of `make icm`: label the built-in claims by ICM with a small real model on this machine.

    python scripts/run_local.py [--model gemma-3-270m] [ICM_OPTION ...]      # e.g. --seed 2

Makes the model if it is missing, starts a vLLM server for the time of the run, and calls src/experiments/ICM.py against
it; options not known here go there. A run that is complete is only shown: no server is started. Ctrl-C stops the server
too, and the same command resumes the run. The exit code is ICM.py's; 2 if the server did not come up.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

REPO_ROOT: Final = Path(__file__).resolve().parents[1]
if str(REPO_ROOT) not in sys.path:  # run as a script, without an installed package
    sys.path.insert(0, str(REPO_ROOT))

from core.vllm_server import ServerFailed, VLLMServer  # noqa: E402

ICM: Final = REPO_ROOT / "src" / "experiments" / "ICM.py"
# What a run on the built-in claims needs to end within minutes on two cores; each can be given again, and differently.
DEFAULTS: Final = {"--testbed": "builtin"}


def icm_command(model: str, given: Sequence[str]) -> list[str]:
    """ICM.py with the defaults of a local run wherever `given` does not say otherwise."""
    names = {argument.split("=", 1)[0] for argument in given}
    defaults = [part for name, value in DEFAULTS.items() if name not in names for part in (name, value)]
    if "--data" in names and "--testbed" not in names:
        defaults = [part for name, value in DEFAULTS.items() if name != "--testbed" and name not in names for part in (name, value)]
    return [sys.executable, str(ICM), "--model", model, *defaults, *given]


def run_icm(command: Sequence[str], url: str) -> int:
    """Run ICM.py against `url` to its end and return its exit code; Ctrl-C and SIGTERM are left to it.

    A terminal sends Ctrl-C to it as well as to us: it saves, says how to resume, and ends, and we wait for that.
    """
    environment = {**os.environ, "VLLM_BASE_URL": url, "USE_VLLM": "true"}
    process = subprocess.Popen(command, env=environment)
    try:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:
                continue
    finally:
        if process.poll() is None:  # we were told to end (SIGTERM): so is it, and it gets the time to save
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def is_complete(command: Sequence[str]) -> bool | int:
    """Whether the run is complete (its summary was printed then); an exit code where the command itself is wrong."""
    code = subprocess.run([*command, "--is_complete"], check=False).returncode
    return code == 0 if code in (0, 1) else code


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", default="gemma-3-270m", help="a model that scripts/prepare_model.py knows")
    parser.add_argument("--server_log", type=Path, default=REPO_ROOT / "runs" / "vllm_server.log")
    options, rest = parser.parse_known_args(arguments)
    command = icm_command(options.model, rest)

    complete = is_complete(command)
    if complete is True:
        return 0
    if complete is not False:
        return complete
    prepare = [sys.executable, str(REPO_ROOT / "scripts" / "prepare_model.py"), "--model", options.model]
    if not (REPO_ROOT / "models" / options.model / "provenance.json").is_file():
        if code := subprocess.run(prepare, check=False).returncode:
            return code
    try:
        with VLLMServer(model=options.model, log=options.server_log) as server:
            return run_icm(command, server.url)
    except ServerFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped before the run began.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
