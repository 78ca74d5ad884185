"""vLLM's options as its own parser reads them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.vllm_command import vllm_installed
from scripts.vllm_options import OTHER_SHORT, READ, SHORT, count_of, is_on, spelled_out, value_of

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("given", "full"),
    [
        (["-tp", "2"], ["--tensor-parallel-size", "2"]),
        (["-tp=2"], ["--tensor-parallel-size=2"]),
        (["-t", "2"], ["--tensor-parallel-size", "2"]),
        (["-qfp8"], ["--quantization=fp8"]),
        (["-q=fp8"], ["--quantization=fp8"]),
        (["-pp", "2", "-dp", "3", "-ep"], spelled_out(["--pi", "2", "--data-parallel-size", "3", "--enable-ex"])),
        (["--tensor_para=2"], ["--tensor-parallel-size=2"]),
        (["--no-enf"], ["--no-enforce-eager"]),
        (["-ac.backend=X"], ["--attention-config.backend=X"]),
        (["-ac", '{"a": 1, "b": {"c": "d"}}'], ["--attention-config.a", "1", "--attention-config.b", '{"c": "d"}']),
        (["-ac", "{}"], ["--attention-config", "{}"]),
        (["-ac", "nonsense", "-x"], ["--attention-config", "nonsense", "-x"]),
        (["-ac"], ["--attention-config"]),
        *(
            ([word], [word])
            for word in ("-p", "-d", "-O3", "-1", "-", "--", "---", "--m", "--e", "--=", "text", "", "-r")
        ),
        (["--data-parallel-size-local=2"], ["--data-parallel-size-local=2"]),
        (["--quantization-config.x", "y"], ["--quantization-config.x", "y"]),
    ],
)
def test_options_are_spelled_out(given: list[str], full: list[str]) -> None:
    assert spelled_out(given) == full
    assert spelled_out(full) == full


def test_the_last_of_several_counts() -> None:
    options = spelled_out(["-tp", "2", "--tensor-parallel-size=4", "--enf", "--no-enforce-eager"])
    assert count_of(options, "tensor-parallel-size") == 4
    assert not is_on(options, "enforce-eager")
    assert is_on([*options, "--enforce-eager"], "enforce-eager")
    assert value_of(options, "quantization", "") == ""
    assert count_of(["--tensor-parallel-size", "two"], "tensor-parallel-size") == 1


OF_VLLM = """
import importlib, json
names = []
for place in ("entrypoints.launchers.cli_args", "entrypoints.common.cli_args", "entrypoints.openai.cli_args"):
    try:
        module = importlib.import_module(f"vllm.{place}")
    except ImportError:
        continue
    from vllm.utils.argparse_utils import FlexibleArgumentParser
    parser = module.make_arg_parser(FlexibleArgumentParser())
    print(json.dumps([action.option_strings for action in parser._actions]))
    break
"""


@pytest.mark.real_server
@pytest.mark.timeout(300)
@pytest.mark.skipif(not vllm_installed(), reason="needs vLLM (make setup-local)")
def test_they_are_read_as_vllms_parser_reads_them() -> None:
    done = subprocess.run(
        [sys.executable, "-c", OF_VLLM], cwd=REPOSITORY, capture_output=True, text=True, timeout=240, check=True
    )
    options = json.loads(done.stdout.splitlines()[-1])
    every = [name for action in options for name in action]
    short = {name: action[0] for action in options for name in action if not name.startswith("--")}
    assert set(short) <= {*SHORT, *OTHER_SHORT}
    assert short.items() >= SHORT.items()
    for full, least in READ.items():
        assert f"--{full}" in every
        for length in range(1, len(full) + 1):
            begin = f"--{full[:length]}"
            meant = {name for name in every if name.startswith(begin)}
            taken = begin in every or len(meant) == 1
            assert (length >= len(least)) == taken, begin
            assert spelled_out([begin]) == [f"--{full}" if taken else begin]
