#!/usr/bin/env python3
"""Smoke check of vLLM servers: do they answer ICM's questions exactly and cheaply?

    python scripts/test_vllm_server.py                              # the servers that VLLM_BASE_URL or SECRETS names
    python scripts/test_vllm_server.py --url http://host:8000 --model meta-llama/Llama-3.1-8B --wait 600
    python scripts/test_vllm_server.py --wait 600 --log vllm.log    # what its log says, if it does not start

One line a check, and what to do where one fails; of several servers each is checked, and then whether they are alike.
Exit code 0: all passed; 1: a check failed; 2: nothing answers at one of the URLs, or the arguments are wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

REPO_ROOT: Final = Path(__file__).resolve().parents[1]
if str(REPO_ROOT) not in sys.path:  # run as a script, without an installed package
    sys.path.insert(0, str(REPO_ROOT))

    from core.packages import need_packages

    need_packages()

from core.errors import APIError, ConfigurationError, RequestRejected  # noqa: E402
from core.flags import FlagParser  # noqa: E402
from core.llm_api.engines.vllm import VLLMClient  # noqa: E402
from core.llm_api.engines.vllm_group import ALIKE_HINT, difference  # noqa: E402
from core.llm_api.http.retry import RetryPolicy  # noqa: E402
from core.llm_api.http.transport import HttpOptions, HttpTransport  # noqa: E402
from core.llm_api.labels import SpelledLabels  # noqa: E402
from core.llm_api.llm import ModelAPI  # noqa: E402
from core.llm_api.tokens import QUESTION, prompt_ids, spell_labels  # noqa: E402
from core.llm_api.types import EngineIdentity, Prompt, Segment  # noqa: E402
from core.settings import Settings  # noqa: E402
from core.vllm_log import StartFailure, start_failure  # noqa: E402
from src.pipeline.tree_saving import Saving, tree_saving  # noqa: E402

START: Final = "scripts/launch_vllm_server.sh {8B|70B|405B|local} starts one"
NO_LOGPROBS: Final = (
    "start the server with --max-logprobs 20 (vLLM's default), and without a proxy that takes logprobs out of answers"
)
CACHING_OFF: Final = "start the server with --enable-prefix-caching and --block-size 16"
BRANCHES_LOST: Final = (
    "a whole prompt is found again, but not a part of one: start the server with --disable-hybrid-kv-cache-manager, as "
    "scripts/launch_vllm_server.sh local does where a model mixes windows with full attention (Gemma 3); of several "
    "data-parallel engines each has a cache of its own: start single servers"
)
LARGE_BLOCKS: Final = (
    "its blocks are large, and not even all of them are found again: a model with only attention layers can be started "
    "with --block-size 16 and --disable-hybrid-kv-cache-manager; one with layers that keep a state cannot"
)
LOG_TAIL: Final = 100_000
"""Bytes at a log's end that are searched for why the start failed."""
WORDS: Final = [
    "north",
    "river",
    "copper",
    "seven",
    "lamp",
    "window",
    "garden",
    "slow",
    "paper",
    "stone",
    "quiet",
    "market",
    "orange",
    "ladder",
    "cloud",
    "violin",
]


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the report. todo: what to do about a failure. server: the URL that was checked."""

    name: str
    passed: bool
    found: str
    todo: str = ""
    server: str = ""

    def line(self) -> str:
        """For a terminal."""
        todo = f"  ->  {self.todo}" if self.todo and not self.passed else ""
        return f"{'pass' if self.passed else 'FAIL'}  {self.name:<20} {self.found}{todo}"


class Waiting:
    """The wait for a server: its deadline, its log if one was given, and its line on standard error."""

    EVERY: Final = 15.0  # seconds between lines where there is no terminal

    def __init__(self, seconds: float, log: Path | None = None) -> None:
        self._start = time.monotonic()
        self._deadline = self._start + seconds
        self._log = log
        self._log_start = _size(log)
        self._shown = self._start

    @property
    def over(self) -> bool:
        """Whether the time is up."""
        return time.monotonic() >= self._deadline

    def failure(self) -> StartFailure | None:
        """A failed start in the log: in what was written since the wait began or, once the time is up, in its end."""
        return start_failure(self._tail(from_the_start=not self.over))

    def show(self, url: str, reason: str) -> None:
        """Show the state of the wait; on a terminal one line that changes."""
        now = time.monotonic()
        lines = self._tail(from_the_start=True).strip().splitlines()
        line = f"waiting for {url}: {now - self._start:3.0f} s  {lines[-1].strip() if lines else reason}"
        if sys.stderr.isatty():
            sys.stderr.write(f"\r\033[K{line[:110]}")
        elif now - self._shown >= self.EVERY:
            self._shown = now
            sys.stderr.write(f"{line[:110]}\n")
        sys.stderr.flush()

    def end(self) -> None:
        """Remove the changing line."""
        if sys.stderr.isatty():
            sys.stderr.write("\r\033[K")
            sys.stderr.flush()

    def _tail(self, *, from_the_start: bool) -> str:
        """The end of the log; from_the_start: only what was written since the wait began."""
        if self._log is None:
            return ""
        start = self._log_start if from_the_start else 0
        try:
            with self._log.open("rb") as log:
                log.seek(max(start, _size(self._log) - LOG_TAIL))
                return log.read().decode(errors="replace")
        except OSError:
            return ""


def _size(log: Path | None) -> int:
    try:
        return 0 if log is None else log.stat().st_size
    except OSError:
        return 0


async def examine(
    settings: Settings, model: str | None, wait: float, report: Callable[[Check], None], log: Path | None = None
) -> int:
    """Check every server, and whether several are alike; calls `report` with each check; returns the exit code.

    wait: seconds that the servers together may take to start. log: of a server that is being started.
    """
    waiting = Waiting(wait, log)
    codes: list[int] = []
    identities: dict[str, EngineIdentity] = {}
    for url in settings.vllm_base_url:

        def of_this(check: Check, url: str = url) -> None:
            report(replace(check, server=url))

        code, identity = await _examine_one(url, settings, model, waiting, of_this)
        codes.append(code)
        if identity is not None:
            identities[url] = identity
    if len(identities) > 1:
        codes.append(_compare(identities, report))
    return max(codes)


def _compare(identities: Mapping[str, EngineIdentity], report: Callable[[Check], None]) -> int:
    """One group of servers answers as one engine only if all are alike; returns the exit code."""
    first, *others = identities
    differences = [(url, difference(identities[url], identities[first])) for url in others]
    found = "; ".join(f"{url} is not like {first}: {what}" for url, what in differences if what)
    report(Check("servers alike", not found, found or f"{len(identities)} servers, one fingerprint", ALIKE_HINT))
    return 1 if found else 0


async def _examine_one(
    url: str, settings: Settings, model: str | None, waiting: Waiting, report: Callable[[Check], None]
) -> tuple[int, EngineIdentity | None]:
    """Make the checks of one server until one rules out the rest: exit code, and the server's identity if known."""
    options = HttpOptions(
        connect_timeout=settings.connect_timeout,
        read_timeout=settings.read_timeout,
        retry=RetryPolicy(max_attempts=2, deadline=60.0),
    )
    start = time.monotonic()
    served = await _served(url, settings, options, waiting)
    if isinstance(served, APIError):
        failure = waiting.failure()
        found = f"{url}: {served.args[0]}" + (f" Its log shows {failure.what}." if failure else "")
        report(Check("reachable", False, found, failure.todo if failure else served.hint or START))
        return 2, None
    report(Check("reachable", True, f"{url} after {time.monotonic() - start:.1f} s"))

    wanted = model or (served[0] if served else "")
    names = ", ".join(served) or "no model"
    if wanted not in served:
        report(
            Check("model served", False, f"{names}, not {wanted or 'any'}", f"give one of these as --model, or {START}")
        )
        return 1, None
    client = VLLMClient(url, wanted, api_key=settings.vllm_api_key, options=options)
    try:
        return await _ask(client, wanted, report)
    except APIError as error:
        report(Check("answers", False, str(error.args[0]), error.hint or "see the server's log"))
        return 1, None
    finally:
        await client.aclose()


async def _ask(client: VLLMClient, model: str, report: Callable[[Check], None]) -> tuple[int, EngineIdentity | None]:
    identity = await client.connect()
    report(Check("model served", True, f"{model}, vLLM {identity.version or '?'}, context {identity.max_model_len}"))
    try:
        seconds = await ModelAPI(client, scores=False).ready()
    except APIError as error:
        report(Check("ready", False, str(error.args[0]), error.hint or "see the server's log, and start it anew"))
        return 1, None
    report(Check("ready", True, f"wrote one token in {seconds:.2f} s"))
    try:
        identity = await client.start()
    except (ConfigurationError, RequestRejected) as error:
        named = error.hint if isinstance(error, ConfigurationError) else ""
        report(Check("logprobs", False, str(error.args[0]), named or NO_LOGPROBS))
        return 1, None
    report(Check("logprobs", True, f"the top {client.top_logprobs} of a next token"))

    update = "update vLLM, or start it with --max-logprobs 20 and run ICM with --missing_label floor"
    try:
        labels = await spell_labels(client)
    except ConfigurationError as error:
        report(Check("exact label logprobs", False, str(error.args[0]), error.hint))
        return 1, identity
    ok, found = await _labels_exact(client, labels)
    report(Check("exact label logprobs", ok, found, update))
    plain = "as whole prompts: works, but a server from scripts/launch_vllm_server.sh would answer sooner"
    twice = "; work on shared prefixes is repeated for each prompt: install this package where vLLM is"
    trees = "as trees of segments" + ("" if client.fast_prefixes else twice)
    report(Check("pools travel", True, trees if client.takes_trees else plain))
    passed = ok
    cached, found = await _prefix_cached(client, labels, identity.max_model_len)
    report(Check("prefix caching", cached, found, CACHING_OFF))
    saving = await tree_saving(client, labels, WORDS, time.time_ns(), identity.max_model_len)
    if saving is not None:  # else the check before shows what is missing
        report(tree_saves(saving, cached))
    return 0 if passed and cached and (saving is None or saving.enough) else 1, identity


def tree_saves(saving: Saving, cached: bool) -> Check:
    """How much of a new pool the server's prefix cache saves. cached: whether it finds an earlier prompt again."""
    block = f"blocks of {saving.block}" if saving.block else "a size of blocks that it does not tell"
    found = (
        f"the tree saves {saving.saved:,} of {saving.asked:,} prompt tokens (possible: {saving.possible:,}, {block})"
    )
    if saving.in_large_blocks:
        found += f"; only whole blocks are saved, {saving.at_best:,} in blocks of 16: larger pools save a larger share"
    todo = CACHING_OFF if not cached else LARGE_BLOCKS if saving.in_large_blocks else BRANCHES_LOST
    return Check("tree saves", saving.enough, found, todo)


async def _served(url: str, settings: Settings, options: HttpOptions, waiting: Waiting) -> list[str] | APIError:
    """Names of the served models, or an error once the time is up or the log shows a failed start."""
    http = HttpTransport(url, key=settings.vllm_api_key, key_name="VLLM_API_KEY", options=options, absent=START)
    try:
        while True:
            try:
                listed = json.loads(await http.send("GET", "/v1/models"))
                return [str(card["id"]) for card in listed["data"]]
            except (ValueError, LookupError, TypeError):
                return ConfigurationError("answers, but not like a vLLM server.", hint=START)
            except APIError as error:
                if waiting.over or waiting.failure() or isinstance(error, ConfigurationError | RequestRejected):
                    return error
                waiting.show(url, str(error.args[0]))
            await asyncio.sleep(0.5)
    finally:
        waiting.end()
        await http.aclose()


async def _labels_exact(client: VLLMClient, labels: SpelledLabels) -> tuple[bool, str]:
    tokens = await prompt_ids(client, QUESTION)
    (answer,) = (await client.score(labels.queries([Prompt((Segment("", tokens),), name="label check")]))).logprobs
    how = "by token id" if client.exact_labels else "only among the top logprobs"
    return (
        client.exact_labels,
        f"{how}; "
        + ", ".join(
            f"log P({text!r}) {value:.2f}" for text, value in zip(labels.asked.texts, answer.values, strict=True)
        ),
    )


async def _prefix_cached(client: VLLMClient, labels: SpelledLabels, context: int | None) -> tuple[bool, str]:
    """Ask a new long prompt twice: the second time nearly all of it must come from the cache."""
    words = random.Random(time.time_ns()).choices(WORDS, k=min(600, (context or 2048) // 4))
    tokens = await prompt_ids(client, " ".join(words))
    prompt = Prompt((Segment("", tokens),), name="prefix cache check")
    seconds = []
    before = None
    for _ in range(2):
        before = await client.prefix_cache()
        start = time.monotonic()
        await client.score(labels.queries([prompt]))
        seconds.append(time.monotonic() - start)
    after = await client.prefix_cache()
    if before is None or after is None:
        return False, "the server shows no counters at /metrics"
    hits = (after - before).hits
    rate = hits / len(tokens)
    found = (
        f"hit rate {rate:.2f} of a second request ({len(tokens)} tokens), {seconds[1]:.2f} s after {seconds[0]:.2f} s"
    )
    return hits >= 0.75 * len(tokens), found


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="base URL, or several with commas (default: VLLM_BASE_URL)")
    parser.add_argument("--model", help="name under which it is served (default: the first one it serves)")
    parser.add_argument("--wait", type=float, default=0.0, metavar="SECONDS", help="how long they may take to start")
    parser.add_argument("--log", type=Path, help="log of a server that is being started: why it does not start")
    parser.add_argument("--json", action="store_true", help="one JSON list instead of lines")
    options = parser.parse_args(arguments)
    checks: list[Check] = []

    def report(check: Check) -> None:
        checks.append(check)
        if not options.json:
            print(check.line(), flush=True)

    try:
        settings = Settings.load({"vllm_base_url": options.url})
        code = asyncio.run(examine(settings, options.model, options.wait, report, options.log))
    except ConfigurationError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    if options.json:
        print(json.dumps([asdict(check) for check in checks], indent=1))
    return code


if __name__ == "__main__":
    sys.exit(main())
