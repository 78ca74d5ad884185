#!/usr/bin/env python3
"""The job of `make icm`: label the built-in claims by ICM with a small real model on this machine.

    python scripts/run_local.py [--model gemma-3-270m] [ICM_OPTION ...]      # e.g. --seed 2

Makes the model if it is missing, starts a vLLM server for the time of the run, has a new kind of server checked for
scores that repeat to the last bit, and calls src/experiments/ICM.py against it; options not known here go there. A run
that is complete is only shown: no server is started. Ctrl-C stops the server too, and the same command resumes the run.
The exit code is ICM.py's; 2 if the server did not come up.
"""

from __future__ import annotations

import argparse
import os
import shlex
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
DETERMINISM: Final = REPO_ROOT / "scripts" / "test_determinism.py"


DEFAULTS: Final = ("--batch_size", "64", "--alpha", "50", "--calibrate", "mean")
"""What a small model needs (docs/lab-log.md); the search takes three minutes on two cores.

Given flags come later and win."""


UNFINISHED: Final = (1, 130)
"""Exit codes of a run that can be resumed: the model failed, Ctrl-C."""


def icm_command(model: str, given: Sequence[str]) -> list[str]:
    """ICM.py on all built-in claims, unless `given` names other data: 64 by search, the rest from their labels."""
    names = {argument.split("=", 1)[0] for argument in given}
    testbed = [] if names & {"--testbed", "--data"} else ["--testbed", "builtin"]
    if testbed and not names & {"--num_batches", "--passes"}:  # those label whole batches by themselves
        testbed.append("--label_rest")
    return [sys.executable, str(ICM), "--model", model, *testbed, *DEFAULTS, *given]


def run_icm(command: Sequence[str], url: str) -> int:
    """Run ICM.py against `url` to its end and return its exit code, passing on Ctrl-C and SIGTERM.

    It is put into a process group of its own, because a terminal's Ctrl-C would otherwise reach it twice: it takes the
    first one for "save and end", the second for "end now".
    """
    environment = {**os.environ, "VLLM_BASE_URL": url, "USE_VLLM": "true"}
    process = subprocess.Popen(command, env=environment, process_group=0)
    try:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:
                process.send_signal(signal.SIGINT)
    finally:
        if process.poll() is None:  # SIGTERM or SIGHUP told us to end
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def check_once(url: str) -> None:
    """Let test_determinism.py look at this server in short, unless it passed before; what it finds, ICM.py repeats."""
    short = ["--quick", "--prompts", "4", "--unless_passed"]
    subprocess.run([sys.executable, str(DETERMINISM), "--url", url, *short], check=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", default="gemma-3-270m", help="a model that scripts/prepare_model.py knows")
    parser.add_argument("--server_log", type=Path, default=REPO_ROOT / "runs" / "vllm_server.log")
    options, rest = parser.parse_known_args(arguments)
    command = icm_command(options.model, rest)

    # Prints the summary of a complete run (0), nothing of an unfinished one (1), and complains about bad input (2).
    if (code := subprocess.run([*command, "--is_complete"], check=False).returncode) != 1:
        return code
    prepare = [sys.executable, str(REPO_ROOT / "scripts" / "prepare_model.py"), "--model", options.model]
    missing = not (REPO_ROOT / "models" / options.model / "provenance.json").is_file()
    if missing and (code := subprocess.run(prepare, check=False).returncode):
        return code
    try:
        with VLLMServer(model=options.model, log=options.server_log) as server:
            check_once(server.url)
            code = run_icm(command, server.url)
        if code in UNFINISHED:  # ICM.py has said how to go on with a server, and this one is gone
            again = [sys.executable, str(Path(__file__)), *(sys.argv[1:] if arguments is None else arguments)]
            print(f"The server was stopped too. To start it again and go on:\n  {shlex.join(again)}", file=sys.stderr)
        return code
    except ServerFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped before the run began.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
