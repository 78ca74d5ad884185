"""Coverage-guided fuzzing (atheris) of everything that reads bytes from outside.

    python -m tests.faults.fuzz --seconds 600 --jobs 2           # CPU seconds for each parser, two at a time
    python -m tests.faults.fuzz --only jsonl csv --seconds 60

Each parser runs in a process of its own. A parser may refuse what it is given with the errors that it documents; any
other exception, a hang of ten seconds or 2 GB of memory is a crash, and the input that did it is kept.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import Any

# Only what is imported here is watched by the fuzzer, and only where it runs.
_WATCH: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
if "--parser" in sys.argv:
    import atheris

    _WATCH = atheris.instrument_imports(include=["core", "src"])

with _WATCH:
    from contrib.monitoring.relabel import page
    from contrib.monitoring.vllm_scrape import Replica
    from core.errors import APIError, ConfigurationError, MissingLabel
    from core.llm_api.http.completions import read_answers, read_tree_answer, token_key, token_logprobs
    from core.llm_api.http.retry import parse_retry_after
    from core.llm_api.http.server_errors import server_message
    from core.llm_api.http.vllm_metrics import kv_block_size, kv_cache_capacity, prefix_cache_counters
    from core.llm_api.text.http_text import _generation, _pieces, _vectors
    from core.llm_api.types import Prompt, Segment
    from core.settings import Settings, read_secrets
    from icm_vllm.prompt_tree import read_request
    from src.experiments.experiment_file import load_experiment
    from src.experiments.watch import Watch
    from src.icm.testbeds import BadInput
    from src.pipeline.datafiles import load_data_file
    from src.results.page import render_report
    from src.results.prices import read_prices
    from src.results.run_folder import RunFolder
    from src.results.run_reader import read_all

LABELS = (7, 9)
PROMPTS = [Prompt((Segment("x", [i, 1]), Segment("y", [2])), name=f"claim {i}") for i in range(2)]
MEMORY = Path("/dev/shm")  # a disk would be what is waited for
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
            found = token_logprobs(top, (token_key(7), token_key(9)), missing="floor", name="x")
            assert max(found.values) <= 1e-3


def tree_answer(content: bytes) -> None:
    with contextlib.suppress(APIError):
        read_tree_answer(content, LABELS, PROMPTS)


def tree_request(content: bytes) -> None:
    with contextlib.suppress(ValueError):
        tree, *_ = read_request(content)
        tree.lengths()
        list(tree.prompts())


def stream(content: bytes) -> None:
    """Cut where its first byte says."""

    async def read() -> None:
        async def chunks() -> AsyncGenerator[bytes, None]:
            size = content[0] + 1 if content else 1
            for start in range(1, len(content), size):
                yield content[start : start + size]

        async for piece in _pieces(chunks(), silence=60.0):
            piece.text.encode()

    with contextlib.suppress(APIError):
        asyncio.run(read())


def text_answer(content: bytes) -> None:
    with contextlib.suppress(APIError):
        _generation(content).text.encode()
    with contextlib.suppress(APIError):
        assert len(_vectors(content, 2)) == 2


def metrics(content: bytes) -> None:
    text = content.decode(errors="replace")
    prefix_cache_counters(text)
    kv_cache_capacity(text)
    kv_block_size(text)


def metrics_page(content: bytes) -> None:
    labels = {"engine": "vllm", "model_id": "m"}
    page([Replica(labels, content.decode(errors="replace"), 0.1), Replica({**labels, "engine": "b"}, None, 0.1)])


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


def run_folder(content: bytes) -> None:
    """As `icm report` and `icm watch` show it: run.json, then its journal, then its labels."""
    document, journal, labels = [*content.split(b"\0", 2), b"", b""][:3]
    _file("run.json", document)
    _file("log.jsonl", journal)
    _file("labels.jsonl", labels)
    watch = Watch(_HOME)
    watch.poll()
    watch.lines(over=False)
    try:
        render_report(*read_all([_HOME]))
    except BadInput as error:
        _one_line(error)


def experiment(content: bytes) -> None:
    try:
        load_experiment(_file("experiment.yaml", content))
    except BadInput as error:
        _one_line(error)


def prices(content: bytes) -> None:
    try:
        read_prices(_file("prices.yaml", content))
    except BadInput as error:
        _one_line(error)


_ROW = b'{"question": "Is 4 even?", "choice": "yes", "label": 1, "consistency_id": 3}'
_RUN = (
    b'{"format":2,"settings":{"testbed":"builtin","model":"m","batch_size":2,"alpha":5.0,"seed":1,"num_seed":1},"engine":'
    b'{"version":"0.26"},"environment":{"python":"3.11"},"started":"2026-11-21T10:00:00+00:00","finished":null,"left_out":1,'
    b'"result":{"accuracy":0.5,"U":1.5,"warning":"w"},"cost":{"seconds":2.5,"tokens_sent":9},"parts":["seed-1"]}'
)
_LOG = (
    b'{"event":"start","labels":{"0":true},"scores":{"0":-0.75},"U":-0.75,"asked":1,"tokens_sent":11,"seconds":0.4}\n'
    b'{"event":"step","iteration":0,"claim":1,"log_odds":-1.0,"current":null,"predicted":false,"tried":3,"excess":0,'
    b'"U_proposed":2.3,"T":10.0,"probability":1.0,"accepted":true,"U":2.3,"predictability":0.04,"inconsistent":0,"labelled"'
    b':2,"true_labels":1,"changes":{"1":false},"scores":{"0":1.5,"1":0.5},"asked":4,"tokens_cached":3,"seconds":1.4}\n'
)
_LABELS = (
    b'{"row":0,"consistency_id":"8","question":"ferry","choice":"a","choice_2":"b","label":true,"log_odds":1.5,'
    b'"zero_shot":3.8,"gold":true,"by":"icm"}\n{"row":1,"choice":"b","label":false,"log_odds":null,"gold":false}\n'
)
PARSERS: dict[str, tuple[Callable[[bytes], None], bytes]] = {
    "json": (data_file("json"), b"[" + _ROW + b"," + _ROW + b"]"),
    "jsonl": (data_file("jsonl"), _ROW + b"\n" + _ROW + b"\n"),
    "csv": (data_file("csv"), b'question,choice,label\n"Is 4\neven?",yes,1\n'),
    "options": (
        data_file("json"),
        b'{"question":"q","choice":["a","b"],"label":"B"}\n{"question":"r","choice":'
        b'{"text":["1","2"],"label":["A","B"]},"consistency_relation":"at most one"}\n',
    ),
    "lists-csv": (data_file("csv"), b"Question; choice;label;consistency_id\nq;['a', 'b'];[1, 0];nan\nr;[1, 2];;\n"),
    "secrets": (secrets, b"# c\nexport VLLM_BASE_URL='http://h:1/v1'  # x\nAPI_KEY=abc\n"),
    "yaml": (yaml_config, b"read_timeout: 5\nvllm_base_url: [http://a:1, http://b]\n"),
    "completions": (
        completions,
        b'{"choices":[{"index":1,"logprobs":{"top_logprobs":[{"token_id:7":-1.5,"token_id:9":null}]}},{"index":0,'
        b'"logprobs":{"top_logprobs":[{"token_id:7":-1,"token_id:9":-2}]}}],"usage":{"prompt_tokens":6}}',
    ),
    "chat-style": (
        completions,
        b'{"choices":[{"index":0,"logprobs":{"content":[{"id":7,"token":"token_id:7","bytes":[],"logprob":-1,'
        b'"top_logprobs":[{"id":9,"token":"token_id:9","logprob":null}]}]}},{"index":1,"logprobs":{"tokens":["a"],'
        b'"token_logprobs":[-1],"top_logprobs":null}}],"usage":{"prompt_tokens":6}}',
    ),
    "tree-answer": (tree_answer, b'{"logprobs":[[-1,-2],[null,-0.5]],"prompt_tokens":6,"cached_tokens":0}'),
    "tree-request": (
        tree_request,
        b'{"labels":[7,9],"tree":{"segments":[[1,2],[3]],"parents":[-1,0],"pieces":[0,1],"ends":[1]}}',
    ),
    "stream": (
        stream,
        b'\x20data: {"choices":[{"index":0,"delta":{"content":"no"},"finish_reason":null}]}\n\n: c\r\n'
        b'data: {"choices":[{"delta":{},"finish_reason":"stop"}],"usage":{"prompt_tokens":3,"completion_tokens":1}}\r\r'
        b"data: [DONE]\n\n",
    ),
    "text-answer": (
        text_answer,
        b'{"choices":[{"message":{"content":"no"},"finish_reason":"stop"}],"usage":{"prompt_tokens":3},'
        b'"data":[{"index":1,"embedding":[0.5,1]},{"index":0,"embedding":[1e3,-1]}]}',
    ),
    "metrics": (
        metrics,
        b'vllm:prefix_cache_queries_total{engine="0"} 12.0\nvllm:prefix_cache_hits_total{engine="0"} 3.0\n'
        b'vllm:cache_config_info{block_size="16",num_gpu_blocks="4096",sliding_window="None"} 1.0\n',
    ),
    "metrics-page": (
        metrics_page,
        b"# HELP vllm:running Requests.\n# TYPE vllm:running gauge\n"
        b'vllm:running{engine="0",a="\\"\\n"} 3.0 1700000000\n# TYPE vllm:t histogram\n'
        b'vllm:t_bucket{le="0.5"} 1\nvllm:t_bucket{le="+Inf"} 2\nvllm:t_count 2\nvllm:t_sum 1.5e-3\n',
    ),
    "error-page": (error_page, b'{"error": {"message": "no", "code": 400}}'),
    "journal": (journal, b'{"event":"start","labels":{"0":true},"scores":{"0":1.5},"U":2}\n{"format": 2}\n'),
    "run-folder": (run_folder, _RUN + b"\0" + _LOG + b"\0" + _LABELS),
    "experiment": (
        experiment,
        b"title: a\ncommand: baselines\nhardware: b\nsettings: {testbed: builtin, seeds: [1], alpha: 5, mirror: true}\n"
        b"notes: >-\n  c\npaper: {source: d, figures: {icm: 0.5}}\nyours: {icm: null}\n",
    ),
    "prices": (
        prices,
        b'currency: USD\ndate: 2026-11-21\nsource: https://a\nmodels:\n  "*": {per_hour: 3.5}\n  m: '
        b"{input_per_million_tokens: 4, output_per_million_tokens: 4}\n",
    ),
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
    parser.add_argument(
        "--parser", choices=list(PARSERS), default=None, help="this one, in this process, until it crashes"
    )
    parser.add_argument("--only", nargs="+", choices=list(PARSERS), default=list(PARSERS), help="these (default: all)")
    parser.add_argument("--seconds", type=int, default=600, help="CPU seconds a parser (default: 600)")
    parser.add_argument("--jobs", type=int, default=1, help="parsers at a time (default: 1)")
    parser.add_argument("--corpus", type=Path, default=None, help="where inputs are kept (default: a temporary folder)")
    parser.add_argument("--json", type=Path, default=None, help="write the result there")
    args = parser.parse_args(arguments)
    above = args.corpus or Path(tempfile.mkdtemp(prefix="icm-corpus-"))
    if args.parser is not None:
        above.mkdir(parents=True, exist_ok=True)
        fuzz(args.parser, args.seconds, above)
    print(f"inputs are kept in {above}", flush=True)
    results: dict[str, Any] = {}

    def campaign(name: str, scratch: str) -> None:
        command = [sys.executable, "-m", "tests.faults.fuzz", "--parser", name, "--seconds", str(args.seconds)]
        done = subprocess.run(
            [*command, "--corpus", str(above / name)],
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env={**os.environ, "TMPDIR": scratch},
            check=False,
        )
        runs = re.findall(r"^#(\d+)\t", done.stderr, re.MULTILINE)
        results[name] = {"exit": done.returncode, "inputs": int(runs[-1]) if runs else 0, "seconds": args.seconds}
        print(name, results[name], flush=True)
        if done.returncode:
            print(done.stderr[-3000:], flush=True)

    with (
        tempfile.TemporaryDirectory(prefix="icm-fuzz-", dir=MEMORY if MEMORY.is_dir() else None) as scratch,
        ThreadPoolExecutor(args.jobs) as threads,
    ):
        list(threads.map(campaign, args.only, repeat(scratch)))
    if args.json is not None:
        args.json.write_text(json.dumps(results, indent=2, sort_keys=True) + "\n")
    return int(any(result["exit"] for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
