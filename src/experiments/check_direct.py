"""Does text in this process work? Loads a model, chats, completes, and extracts topics; pass or fail for each.

    icm check-direct --model models/gemma-3-270m --cpu
    icm check-direct --model meta-llama/Llama-3.1-8B-Instruct --gpu_memory_utilization 0.8

One line a check. Exit code 0: all passed; 1: a check failed; 2: the model did not load.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from core.errors import APIError
from core.flags import FlagParser, number, whole_number
from core.llm_api.local_model import LocalModel
from core.llm_api.text.generation import Generation, Message, Metrics, SamplingOptions
from core.settings import REPO_ROOT

TEMPLATE: Final = REPO_ROOT / "configs" / "chat_template.jinja"
TOPICS: Final = """Extract the topic of each text.

Text: The midfielder scored twice in the last ten minutes of the match.
Topic: football

Text: Rates rose again, and the bank expects inflation to fall next year.
Topic: economy

Text: The new telescope found water in the air of a distant planet.
Topic: astronomy

Text: {text}
Topic:"""
TEXTS: Final = {
    "The orchestra played the symphony, and the violins were wonderful.": ("music", "orchestra", "symphony", "concert"),
    "The chef baked the bread with butter, salt and a little sugar.": (
        "food",
        "cook",
        "bak",
        "bread",
        "recipe",
        "chef",
    ),
    "The striker missed the penalty and the team lost the cup.": ("football", "soccer", "sport"),
}
"""Text -> names of its topic that count as right."""


@dataclass(frozen=True, slots=True)
class Result:
    """What a check found, and whether it passed."""

    passed: bool
    found: str


def chat(model: LocalModel) -> Result:
    """One turn, and the same turn streamed."""
    question = [Message("user", "What is the capital of France?")]
    options = SamplingOptions(max_tokens=24, stop=("\n",))
    whole = model.chat_completions([question], options)[0]
    events = list(model.stream_chat(question, options))
    streamed = "".join(event.text for event in events if event.kind == "token")
    metrics = next(event for event in events if isinstance(event, Metrics))
    shown = f"{_short(whole)}; first token after {metrics.time_to_first_token or 0:.2f} s"
    if streamed != whole.text:
        return Result(False, f"{shown}; streamed it says {streamed!r}")
    return Result(bool(whole.text.strip()), shown)


def completion(model: LocalModel) -> Result:
    """Three prompts as one batch; greedy, so that each gives the same text when asked by itself."""
    prompts = ["One, two, three, four,", "Monday, Tuesday, Wednesday,", "Once upon a time there was"]
    together = model.completion(prompts, max_tokens=8)
    single = model.completion(prompts[:1], max_tokens=8)
    passed = len(together) == 3 and "five" in together[0].text and "Thursday" in together[1].text
    same = "the same alone" if single[0] == together[0] else f"alone {_short(single[0])}"
    return Result(passed, f"{', '.join(_short(one) for one in together)}; {same}")


def sampling(model: LocalModel) -> Result:
    """Sampling: a seed repeats tokens, another changes them, a stop text ends them, a penalty avoids repeated words."""

    def draw(seed: int) -> str:
        return model.completion(
            ["My three favourite animals are"], max_tokens=24, temperature=1.0, top_p=0.95, seed=seed
        )[0].text

    first, again, other = draw(1), draw(1), draw(2)
    stopped = model.completion(["a b c d e f"], max_tokens=24, stop="h")[0]
    flat = model.completion(["no no no no no no"], max_tokens=16)[0].text.split()
    spread = model.completion(["no no no no no no"], max_tokens=16, frequency_penalty=2.0, presence_penalty=2.0)
    kinds = len(set(flat)), len(set(spread[0].text.split()))
    passed = first == again != other and "h" not in stopped.text and kinds[1] > kinds[0]
    return Result(
        passed, f"seed 1 twice {first == again}, seed 2 differs {first != other}, words {kinds[0]} -> {kinds[1]}"
    )


def topics(model: LocalModel) -> Result:
    """Topic extraction from three examples, all texts as one batch; two of three topics must be right."""
    prompts = [TOPICS.format(text=text) for text in TEXTS]
    found = [answer.text.strip().lower() for answer in model.completion(prompts, max_tokens=6, stop="\n")]
    right = [any(name in topic for name in names) for topic, names in zip(found, TEXTS.values(), strict=True)]
    return Result(sum(right) >= 2, f"{', '.join(map(repr, found))}: {sum(right)} of {len(right)}")


CHECKS: Final[dict[str, Callable[[LocalModel], Result]]] = {
    "chat": chat,
    "completion": completion,
    "sampling": sampling,
    "topic extraction": topics,
}


def build_parser() -> argparse.ArgumentParser:
    """The parser of `icm check-direct`."""
    parser = FlagParser(
        prog="icm check-direct", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=str(REPO_ROOT / "models" / "gemma-3-270m"), help="a path or Hugging Face id")
    parser.add_argument("--cpu", action="store_true", help="run on the CPU (make setup-local installs a vLLM for it)")
    parser.add_argument("--gpu_memory_utilization", type=number, help="share of the GPU's memory, 0 to 1")
    parser.add_argument("--max_model_len", type=whole_number, default=2048, help="tokens (default: 2048)")
    parser.add_argument("--tensor_parallel_size", type=whole_number, default=1, help="GPUs (default: 1)")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model")
    parser.add_argument(
        "--chat_template",
        type=Path,
        help="Jinja file; for models that have none (default: the model's own, or a plain one)",
    )
    parser.add_argument("--verbose", action="store_true", help="show vLLM's own log between the lines")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    args = build_parser().parse_args(arguments)
    if not args.verbose:
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")  # vLLM writes its log to standard output
    began = time.monotonic()
    try:
        with _load(args) as model:
            _say("initialisation", Result(True, f"{args.model} after {time.monotonic() - began:.0f} s"))
            passed = [_checked(name, check, model) for name, check in CHECKS.items()]
            return 0 if all(passed) else 1
    except APIError as error:
        _say("initialisation", Result(False, str(error)))
        return 2
    except KeyboardInterrupt:
        return 130


def _load(args: argparse.Namespace) -> LocalModel:
    template = args.chat_template
    return LocalModel(
        args.model,
        gpu_memory_utilization=args.gpu_memory_utilization,
        max_model_len=args.max_model_len,
        tensor_parallel_size=args.tensor_parallel_size,
        trust_remote_code=args.trust_remote_code,
        cpu=args.cpu,
        chat_template=str(template or TEMPLATE) if template or not _has_template(args.model) else None,
    )


def _has_template(model: str) -> bool:
    """Whether a model on disk has a chat template; True for one that is not on disk."""
    folder = Path(model)
    if not folder.is_dir():
        return True
    config = folder / "tokenizer_config.json"
    return (folder / "chat_template.jinja").exists() or (config.exists() and '"chat_template"' in config.read_text())


def _checked(name: str, check: Callable[[LocalModel], Result], model: LocalModel) -> bool:
    began = time.monotonic()
    try:
        result = check(model)
    except APIError as error:
        result = Result(False, str(error))
    _say(name, result, time.monotonic() - began)
    return result.passed


def _say(name: str, result: Result, seconds: float | None = None) -> None:
    took = "" if seconds is None else f" ({seconds:.1f} s)"
    print(f"{'pass' if result.passed else 'FAIL'}  {name:<17} {result.found}{took}", flush=True)


def _short(answer: Generation) -> str:
    text = answer.text.strip()
    return repr(text if len(text) <= 40 else text[:40] + "...")


if __name__ == "__main__":
    sys.exit(main())
