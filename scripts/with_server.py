#!/usr/bin/env python3
"""Run a command while a vLLM server with a small model runs on this machine, at VLLM_BASE_URL.

    python scripts/with_server.py [--model gemma-3-270m] -- icm baselines --testbed builtin --model gemma-3-270m ...

The exit code is the command's; 2 if the server did not start. Ctrl-C and SIGTERM reach the command first, which saves
its work, and then the server.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

REPO_ROOT: Final = Path(__file__).resolve().parents[1]
if str(REPO_ROOT) not in sys.path:  # run as a script, without an installed package
    sys.path.insert(0, str(REPO_ROOT))

    from core.packages import need_packages

    need_packages()

from core.flags import FlagParser  # noqa: E402
from core.vllm_server import ServerFailed, VLLMServer  # noqa: E402
from scripts.run_local import again_by, run_icm  # noqa: E402


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    cut = given.index("--") if "--" in given else len(given)
    command = given[cut + 1 :]
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--model", default="gemma-3-270m", help="name of a folder in models/")
    parser.add_argument("--server_log", type=Path, default=REPO_ROOT / "runs" / "vllm_server.log")
    parser.add_argument("command", nargs="*", help="behind --, with its arguments")
    options = parser.parse_args(given[:cut])
    if options.command or not command:
        parser.error("say what to run behind --")
    try:
        with VLLMServer(model=options.model, log=options.server_log) as server:
            return run_icm(command, server.url, again_by(__file__, given))
    except ServerFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
