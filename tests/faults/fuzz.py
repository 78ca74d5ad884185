"""Coverage-guided fuzzing (atheris) of everything that reads bytes from outside.

    python -m tests.faults.fuzz --seconds 600                    # CPU seconds for each parser
    python -m tests.faults.fuzz --parser jsonl --seconds 60

Each parser runs in a process of its own. A parser may refuse what it is given with the errors that it documents; any
other exception, a hang of ten seconds or 2 GB of memory is a crash, and the input that did it is kept.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# Only what is imported here is watched by the fuzzer, and only where it runs.
_WATCH: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
if "--parser" in sys.argv:
    import atheris

    _WATCH = atheris.instrument_imports(include=["core", "src"])

with _WATCH:
    from core.llm_api.completions import label_logprobs, read_answers, read_tree_answer, token_key
    from core.llm_api.errors import APIError, ConfigurationError, MissingLabel
    from core.llm_api.prompt_tree import read_request
    from core.llm_api.retry import parse_retry_after
    from core.llm_api.transport import server_message
    from core.llm_api.types import LabelTokens, Prompt, Segment
    from core.llm_api.vllm_metrics import kv_block_size, kv_cache_capacity, prefix_cache_counters
    from core.settings import Settings, read_secrets
    from src.icm.testbeds import BadInput
    from src.pipeline.datafiles import load_data_file
    from src.pipeline.run_folder import RunFolder

LABELS = LabelTokens(true_id=7, false_id=9)
PROMPTS = [Prompt((Segment("x", [i, 1]), Segment("y", [2])), name=f"claim {i}") for i in range(2)]
_HOME = Path(tempfile.gettempdir()) / f"icm-fuzz-{os.getpid()}"


def _file(name: str, content: bytes) -> Path:
    _HOME.mkdir(exist_ok=True)
    path = _HOME / name
    path.write_bytes(content)
    return path


def _one_line(error: Exception) -> None:
    if "\n" in str(error):
        raise AssertionError("the complaint has more than one line")


def data_file(kind: str) -> Callable[[bytes], None]:
    def read(content: bytes) -> None:
        try:
            load_data_file(_file(f"data.{kind}", content))
        except BadInput as error:
            _one_line(error)

    return read


def secrets(content: bytes) -> None:
    try:
        read_secrets(_file("SECRETS", content))
        Settings.load(secrets_path=_file("SECRETS", content), environ={})
    except ConfigurationError as error:
        _one_line(error)


def yaml_config(content: bytes) -> None:
    with contextlib.suppress(ConfigurationError):
        Settings.load(config_path=_file("client.yaml", content), secrets_path=_file("none", b""), environ={})


def completions(content: bytes) -> None:
    with contextlib.suppress(APIError, MissingLabel):
        answers = read_answers(content, PROMPTS)
        for top in answers.top:
            found = label_logprobs(top, token_key(7), token_key(9), missing="floor", name="x")
            assert found.true <= 1e-3
            assert found.false <= 1e-3


def tree_answer(content: bytes) -> None:
    with contextlib.suppress(APIError):
        read_tree_answer(content, LABELS, PROMPTS)


def tree_request(content: bytes) -> None:
    with contextlib.suppress(ValueError):
        tree, _ = read_request(content)
        tree.lengths()
        list(tree.prompts())


def metrics(content: bytes) -> None:
    text = content.decode(errors="replace")
    prefix_cache_counters(text)
    kv_cache_capacity(text)
    kv_block_size(text)


def error_page(content: bytes) -> None:
    assert "\n" not in server_message(content)
    parse_retry_after(content.decode("latin-1"))


def journal(content: bytes) -> None:
    _file("log.jsonl", content)
    _file("run.json", content)
    folder = RunFolder(_HOME)
    with contextlib.suppress(BadInput):
        folder.read_log()
    with contextlib.suppress(BadInput):
        folder.read_run()


_ROW = b'{"question": "Is 4 even?", "choice": "yes", "label": 1, "consistency_id": 3}'
PARSERS: dict[str, tuple[Callable[[bytes], None], bytes]] = {
    "json": (data_file("json"), b"[" + _ROW + b"," + _ROW + b"]"),
    "jsonl": (data_file("jsonl"), _ROW + b"\n" + _ROW + b"\n"),
    "csv": (data_file("csv"), b'question,choice,label\n"Is 4\neven?",yes,1\n'),
    "secrets": (secrets, b"# c\nexport VLLM_BASE_URL='http://h:1/v1'  # x\nAPI_KEY=abc\n"),
    "yaml": (yaml_config, b"read_timeout: 5\nvllm_base_url: [http://a:1, http://b]\n"),
    "completions": (
        completions,
        b'{"choices":[{"index":1,"logprobs":{"top_logprobs":[{"token_id:7":-1.5,"token_id:9":null}]}},{"index":0,'
        b'"logprobs":{"top_logprobs":[{"token_id:7":-1,"token_id:9":-2}]}}],"usage":{"prompt_tokens":6}}',
    ),
    "tree-answer": (tree_answer, b'{"logprobs":[[-1,-2],[null,-0.5]],"prompt_tokens":6,"cached_tokens":0}'),
    "tree-request": (
        tree_request,
        b'{"labels":[7,9],"tree":{"segments":[[1,2],[3]],"parents":[-1,0],"pieces":[0,1],"ends":[1]}}',
    ),
    "metrics": (
        metrics,
        b'vllm:prefix_cache_queries_total{engine="0"} 12.0\nvllm:prefix_cache_hits_total{engine="0"} 3.0\n'
        b'vllm:cache_config_info{block_size="16",num_gpu_blocks="4096",sliding_window="None"} 1.0\n',
    ),
    "error-page": (error_page, b'{"error": {"message": "no", "code": 400}}'),
    "journal": (journal, b'{"event":"start","labels":{"0":true},"scores":{"0":1.5},"U":2}\n{"format": 2}\n'),
}
"""Name -> (what reads it, a good example to start from)."""


def fuzz(name: str, seconds: int, corpus: Path) -> None:
    """Does not return: libFuzzer ends the process."""
    parse, example = PARSERS[name]
    (corpus / "example").write_bytes(example)
    started = time.process_time()

    def one(content: bytes) -> None:
        parse(content)
        if time.process_time() - started > seconds:
            sys.stderr.flush()
            os._exit(0)

    flags = [
        "-timeout=10",
        "-rss_limit_mb=2048",
        "-max_len=4096",
        f"-artifact_prefix={corpus}/",
        "-print_final_stats=1",
    ]
    atheris.Setup([sys.argv[0], *flags, str(corpus)], one)
    atheris.Fuzz()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--parser", choices=list(PARSERS), default=None, help="only this one, in this process")
    parser.add_argument("--seconds", type=int, default=600, help="CPU seconds a parser")
    parser.add_argument("--corpus", type=Path, default=None, help="where inputs are kept")
    parser.add_argument("--json", type=Path, default=None, help="write the result there")
    args = parser.parse_args(arguments)
    if args.parser is not None:
        corpus = args.corpus or Path(tempfile.mkdtemp(prefix="icm-corpus-"))
        corpus.mkdir(parents=True, exist_ok=True)
        fuzz(args.parser, args.seconds, corpus)
    results: dict[str, Any] = {}
    for name in PARSERS:
        corpus = (args.corpus or Path(tempfile.mkdtemp(prefix="icm-corpus-"))) / name
        command = [sys.executable, "-m", "tests.faults.fuzz", "--parser", name, "--seconds", str(args.seconds)]
        done = subprocess.run([*command, "--corpus", str(corpus)], stderr=subprocess.PIPE, text=True, check=False)
        runs = [line.split()[0][1:] for line in done.stderr.splitlines() if line.startswith("#")]
        results[name] = {"exit": done.returncode, "inputs": int(runs[-1]) if runs else 0, "seconds": args.seconds}
        print(name, results[name], flush=True)
        if done.returncode:
            print(done.stderr[-3000:], flush=True)
    if args.json is not None:
        args.json.write_text(json.dumps(results, indent=2) + "\n")
    return int(any(result["exit"] for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
