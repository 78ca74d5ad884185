"""Several vLLM servers as one engine: each holds its own part of the prefix tree in its cache.

Each server gets the prompts of one part of [0, 1) (Prompt.place), always the same part. If it drops out, the others
take over its part and keep their own, so that their caches stay useful; when it is back it gets its part again.
All servers must be alike: scores of different weights or kernels do not mix.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Final, TypeVar

from core.errors import APIError, ConfigurationError, RetriesExhausted, ServerChanged, ServerUnreachable
from core.llm_api.engines.vllm import START_HINT, VLLMClient
from core.llm_api.http.gather import all_or_cancel, all_or_settle
from core.llm_api.http.retry import RetryPolicy
from core.llm_api.http.transport import HttpOptions
from core.llm_api.telemetry import RequestTelemetry
from core.llm_api.types import (
    Capabilities,
    EngineAnswer,
    EngineIdentity,
    OnAnswer,
    PrefixCacheCounters,
    Query,
    TokenLogprobs,
    known_to_differ,
)
from core.settings import Settings

if TYPE_CHECKING:
    from core.llm_api.text.generation import Embeddings, Generation, Piece, TextRequest

log = logging.getLogger(__name__)
T = TypeVar("T")

LOST: Final = (ServerUnreachable, RetriesExhausted, ServerChanged)
"""Errors of one server. Any other error (a bad prompt, a missing label) would come from every server."""
BRIEF_ATTEMPTS: Final = 3
BRIEF_DEADLINE: Final = 60.0  # seconds; a request that timed out once is not sent there again
PROBE_AFTER: Final = 5.0  # seconds until a server that dropped out is looked for; doubled each time
PROBE_AT_MOST: Final = 120.0
ALIKE_HINT: Final = (
    "Scores of different models, versions or kernels must not be mixed: start all servers with the same vLLM, model "
    "path and options, on GPUs of one kind."
)


def server_for(place: float, count: int, up: Sequence[int]) -> int:
    """Which of `count` servers is asked about a prompt at `place`; only those in `up` (ascending, not empty) can be
    asked.

    Server i has the part [i/count, (i+1)/count); the part of one that is not up is divided evenly among those that are.
    """
    home = min(int(place * count), count - 1)
    if home in up:
        return home
    within = place * count - home
    return up[min(int(within * len(up)), len(up) - 1)]


def difference(identity: EngineIdentity, expected: EngineIdentity) -> str:
    """How two engines differ, for a user; "" where they do not.

    A server without our extension does not state its type or configuration; its fingerprint shows a difference.
    """
    unlike = [f.name for f in fields(EngineIdentity) if getattr(identity, f.name) != getattr(expected, f.name)]
    for name in {"dtype", "config"}.intersection(unlike):
        if not known_to_differ(getattr(identity, name), getattr(expected, name)):
            unlike.remove(name)
    here, there = (
        replace(engine, fingerprint=engine.fingerprint[:12], config=engine.config[:12])
        for engine in (identity, expected)
    )
    return ", ".join(f"{name} {getattr(here, name)!r}, not {getattr(there, name)!r}" for name in unlike)


@dataclass(eq=False, slots=True)
class _Member:
    """One server. texts: how many it is writing.

    counted: its prefix-cache counters since they were first read; a restart of the server does not reset them.
    """

    client: VLLMClient
    up: bool = False
    texts: int = 0
    counted: PrefixCacheCounters = field(default_factory=PrefixCacheCounters)
    last_read: PrefixCacheCounters | None = None

    async def read_counters(self) -> None:
        now = await self.client.prefix_cache()
        if now is None:
            return
        if self.last_read is not None:
            restarted = now.queries < self.last_read.queries or now.hits < self.last_read.hits
            self.counted += now if restarted else now - self.last_read
        self.last_read = now


@dataclass(eq=False, slots=True)
class _Batch:
    """One batch of queries; positions are positions in it.

    failed: servers that are not asked about this batch again: one that crashes on it and is restarted would be asked
    for ever.
    """

    queries: Sequence[Query]
    on_answer: OnAnswer | None
    answers: dict[int, TokenLogprobs] = field(default_factory=dict)
    failed: set[_Member] = field(default_factory=set)
    parts: list[EngineAnswer] = field(default_factory=list)

    def take(self, positions: list[int], answer: EngineAnswer) -> None:
        self.answers.update(zip(positions, answer.logprobs, strict=True))
        self.parts.append(answer)
        if self.on_answer is not None:
            self.on_answer(positions, answer)


class VLLMGroup:
    """An Engine over the servers of `clients`; their order decides which part of a tree each holds.

    patience: how long the last remaining server is waited for; while there are others, one that fails is given up
    sooner. One that hangs without closing its connections is given up after the client's liveness_timeout.
    probe_after: seconds until a lost server is first looked for again.
    """

    capabilities: Final = Capabilities()

    def __init__(
        self, clients: Sequence[VLLMClient], *, patience: RetryPolicy | None = None, probe_after: float = PROBE_AFTER
    ) -> None:
        self._members = [_Member(client) for client in clients]
        self._patience = patience or RetryPolicy()
        self._brief = replace(
            self._patience,
            max_attempts=min(BRIEF_ATTEMPTS, self._patience.max_attempts),
            deadline=min(BRIEF_DEADLINE, self._patience.deadline),
        )
        self._probe_after = probe_after
        self._connecting: Callable[[VLLMClient], Awaitable[EngineIdentity]] = VLLMClient.start
        self._identity: EngineIdentity | None = None
        self._probes: set[asyncio.Task[None]] = set()

    async def start(self) -> EngineIdentity:
        """Start all servers' clients at once. If any server answers, the others are looked for in the background.

        The identity is that of one server and does not depend on how many there are, so that cached scores stay valid.
        Raises ConfigurationError where two servers differ, naming one and how.
        """
        return await self._meet(VLLMClient.start)

    async def connect(self) -> EngineIdentity:
        """See TextEngine.connect; of all servers, as `start` does."""
        return await self._meet(VLLMClient.connect)

    async def _meet(self, how: Callable[[VLLMClient], Awaitable[EngineIdentity]]) -> EngineIdentity:
        await self._stop_probes()
        self._connecting = how
        answers = await all_or_cancel(self._connect(member) for member in self._members)
        found = {m: g for m, g in zip(self._members, answers, strict=True) if isinstance(g, EngineIdentity)}
        lost = {m: g for m, g in zip(self._members, answers, strict=True) if isinstance(g, APIError)}
        if not found:
            urls = ", ".join(member.client.base_url for member in lost)
            reasons = " ".join(dict.fromkeys(str(error.args[0]) for error in lost.values()))
            raise ServerUnreachable(f"none of the servers {urls} can be asked: {reasons}", hint=START_HINT)
        first, identity = next(iter(found.items()))
        for member, other in found.items():
            unlike = difference(other, identity)
            if unlike:
                raise ConfigurationError(
                    f"{member.client.base_url} is not like {first.client.base_url}: {unlike}.", hint=ALIKE_HINT
                )
        identity = self._identity = replace(
            identity,
            dtype=next((e.dtype for e in found.values() if e.dtype), ""),
            config=next((e.config for e in found.values() if e.config), ""),
        )
        for member in found:
            member.up = True
        for member, error in lost.items():
            log.warning("%s cannot be asked yet, the other servers take its part: %s", member.client.base_url, error)
            self._look_for(member, identity)
        return identity

    async def tokenize(self, texts: Sequence[str], *, special: bool = False) -> list[list[int]]:
        """Token ids of each text, from the first server that can be asked."""
        return await self._of_the_first(lambda client: client.tokenize(texts, special=special))

    async def detokenize(self, tokens: Sequence[Sequence[int]]) -> list[str] | None:
        """See Engine.detokenize; from the first server that can be asked."""
        return await self._of_the_first(lambda client: client.detokenize(tokens))

    async def tokenize_chat(self, messages: Sequence[str]) -> list[list[int]] | None:
        """See Engine.tokenize_chat; from the first server that can be asked."""
        return await self._of_the_first(lambda client: client.tokenize_chat(messages))

    async def score(self, queries: Sequence[Query], *, on_answer: OnAnswer | None = None) -> EngineAnswer:
        """See Engine.score. Every server is asked about its own part, all at once."""
        batch = _Batch(queries, on_answer)
        await self._ask(batch, range(len(queries)))
        return replace(
            EngineAnswer.joined(batch.parts), logprobs=[batch.answers[position] for position in range(len(queries))]
        )

    async def prefix_cache(self) -> PrefixCacheCounters | None:
        """Summed over all servers since each was first read; it never decreases, even where servers are lost or
        restarted.

        A server that does not answer counts with its last numbers. None where no server shows metrics.
        """
        await self._of_each(_Member.read_counters)
        read = [member.counted for member in self._members if member.last_read is not None]
        return sum(read, start=PrefixCacheCounters()) if read else None

    async def kv_cache_tokens(self) -> int | None:
        """The smallest number among the servers that can be asked.

        Not the sum: a search plans its layouts with this number, and its labels must not depend on how many servers
        there are.
        """
        sizes = [
            size for size in await self._of_each(lambda member: member.client.kv_cache_tokens()) if size is not None
        ]
        return min(sizes, default=None)

    async def kv_block_size(self) -> int | None:
        """Tokens in a block of the KV cache, alike on all servers; None where none says."""
        sizes = await self._of_each(lambda member: member.client.kv_block_size())
        return next((size for size in sizes if size is not None), None)

    async def generate(self, request: TextRequest) -> Generation:
        """See TextEngine.generate. Written by the server with the fewest texts in work; by another if that is lost."""
        return await self._of_one(lambda client, retry: client.generate(request, retry=retry))

    async def stream(self, request: TextRequest) -> AsyncGenerator[Piece, None]:
        """See TextEngine.stream and `generate`. A server that is lost after its first piece fails the stream."""
        failed: set[_Member] = set()
        while True:
            member = self._least_busy(failed)
            retry = self._patience if len(self._up) == 1 else self._brief
            member.texts += 1
            try:
                async with aclosing(member.client.stream(request, retry=retry)) as pieces:
                    async for piece in pieces:
                        yield piece
                return
            # Only from before the first piece: a connection that breaks later is a TransientError.
            except LOST as error:
                self._give_up(member, failed, error)
            finally:
                member.texts -= 1

    async def embed(self, texts: Sequence[str]) -> Embeddings:
        """See TextEngine.embed; by one server, or by the next if that is lost."""
        return await self._of_one(lambda client, _: client.embed(texts))

    async def models(self) -> list[str]:
        """See TextEngine.models; of one server that can be asked."""
        return await self._of_one(lambda client, _: client.models())

    @property
    def telemetry(self) -> list[RequestTelemetry]:
        """What was counted about the requests to each server."""
        return [counted for member in self._members for counted in member.client.telemetry]

    async def _of_the_first(self, question: Callable[[VLLMClient], Awaitable[T]]) -> T:
        """Ask the first server that is up; where it is lost, the next one."""
        while True:
            member = self._up[0]
            try:
                return await question(member.client)
            except LOST as error:
                if not self._drop(member, error):
                    raise

    async def _of_one(self, question: Callable[[VLLMClient, RetryPolicy], Awaitable[T]]) -> T:
        failed: set[_Member] = set()
        while True:
            member = self._least_busy(failed)
            retry = self._patience if len(self._up) == 1 else self._brief
            member.texts += 1
            try:
                return await question(member.client, retry)
            except LOST as error:
                self._give_up(member, failed, error)
            finally:
                member.texts -= 1

    def _least_busy(self, failed: set[_Member]) -> _Member:
        return min((member for member in self._up if member not in failed), key=lambda member: member.texts)

    def _give_up(self, member: _Member, failed: set[_Member], error: APIError) -> None:
        """Ask no server twice about one text, even if it comes back. Raises `error` where none is left."""
        failed.add(member)
        self._drop(member, error)
        if failed.issuperset(self._up):
            raise error

    @property
    def bytes_sent(self) -> int:
        """Bytes of request bodies sent to all servers so far."""
        return sum(member.client.bytes_sent for member in self._members)

    async def aclose(self) -> None:
        """Stop looking for lost servers and close all connections; idempotent."""
        await self._stop_probes()
        await asyncio.gather(*(member.client.aclose() for member in self._members))

    @property
    def _up(self) -> list[_Member]:
        """The servers that can be asked; at least one after start()."""
        up = [member for member in self._members if member.up]
        if not up:
            raise RuntimeError("VLLMGroup was not started")
        return up

    async def _ask(self, batch: _Batch, positions: Iterable[int], after: APIError | None = None) -> None:
        """Have the queries at `positions` answered. Raises `after`, the last failure, where no server is left."""
        able = [index for index, member in enumerate(self._members) if member.up and member not in batch.failed]
        if not able and after is not None:
            raise after
        shares: dict[int, list[int]] = {}
        for position in positions:
            server = server_for(batch.queries[position].prompt.place, len(self._members), able)
            shares.setdefault(server, []).append(position)
        await all_or_settle(
            self._ask_one(batch, self._members[server], share, last=len(able) == 1) for server, share in shares.items()
        )

    async def _ask_one(self, batch: _Batch, member: _Member, share: list[int], *, last: bool) -> None:
        def keep(positions: Sequence[int], answer: EngineAnswer) -> None:
            batch.take([share[position] for position in positions], answer)

        queries = [batch.queries[position] for position in share]
        try:
            # While others could answer, a server is soon given up; the last one is waited for.
            retry = self._patience if last else self._brief
            await member.client.score(queries, on_answer=keep, retry=retry, search=last)
        except LOST as error:
            if any(other is not member and other not in batch.failed for other in self._up):
                batch.failed.add(member)
                self._drop(member, error)
            elif last:
                raise
            # Else the others dropped out meanwhile: this one is asked again, now as the last.
            await self._ask(batch, [position for position in share if position not in batch.answers], error)

    def _drop(self, member: _Member, error: APIError) -> bool:
        """Ask others in place of `member` until it is back. False: it is the last one, and stays."""
        if member.up and len(self._up) == 1:
            return False
        if member.up:
            member.up = False
            log.warning("%s dropped out, the other servers take its part over: %s", member.client.base_url, error)
            assert self._identity is not None
            self._look_for(member, self._identity)
        return True

    async def _connect(self, member: _Member) -> EngineIdentity | APIError:
        member.up = False
        try:
            identity = await self._connecting(member.client)
            await member.read_counters()
        except LOST as error:
            return error
        return identity

    async def _of_each(self, question: Callable[[_Member], Coroutine[Any, Any, T]]) -> list[T]:
        """The answers of the servers that can be asked, without those that turn out to be lost."""

        async def ask(member: _Member) -> list[T]:
            try:
                async with asyncio.timeout(BRIEF_DEADLINE):  # small questions: a server that takes longer hangs
                    return [await question(member)]
            except LOST as error:
                self._drop(member, error)
            except TimeoutError:
                silent = ServerUnreachable(f"{member.client.base_url} said nothing for {BRIEF_DEADLINE:g} s.")
                self._drop(member, silent)
            return []

        return [answer for answers in await all_or_cancel(map(ask, self._up)) for answer in answers]

    def _look_for(self, member: _Member, identity: EngineIdentity) -> None:
        probe = asyncio.create_task(self._probe(member, identity), name=f"probe {member.client.base_url}")
        self._probes.add(probe)
        probe.add_done_callback(self._probed)

    def _probed(self, probe: asyncio.Task[None]) -> None:
        self._probes.discard(probe)
        if not probe.cancelled() and (error := probe.exception()) is not None:
            log.error("%s ended, the server stays out", probe.get_name(), exc_info=error)

    async def _probe(self, member: _Member, identity: EngineIdentity) -> None:
        """Look for a lost server, less and less often, until it is back as it was."""
        wait, said = self._probe_after, ""
        while not member.up:
            await asyncio.sleep(wait)
            wait = min(2 * wait, PROBE_AT_MOST)
            if not await member.client.answers():
                continue
            try:
                reason = difference(await self._connecting(member.client), identity)
                await member.read_counters()
            except APIError as error:
                reason = str(error)
            member.up = not reason
            if reason not in ("", said):
                log.warning("%s answers, but stays out: %s", member.client.base_url, reason)
                said = reason
        log.warning("%s is back and takes its part again", member.client.base_url)

    async def _stop_probes(self) -> None:
        probes = list(self._probes)
        for probe in probes:
            probe.cancel()
        await asyncio.gather(*probes, return_exceptions=True)


def open_engine(settings: Settings, model: str, _: object) -> VLLMClient | VLLMGroup:
    """See vllm_engine."""
    return vllm_engine(settings, model)


def vllm_engine(settings: Settings, model: str, *, use_extension: bool = True) -> VLLMClient | VLLMGroup:
    """The server of VLLM_BASE_URL, or all of them as one engine. use_extension: see VLLMClient."""
    options = HttpOptions.of(settings)
    clients = [
        VLLMClient(
            url,
            model,
            api_key=settings.vllm_api_key,
            revision=settings.model_revision or "",
            prompts_per_request=settings.prompts_per_request,
            use_extension=use_extension,
            missing_label=settings.missing_label,
            options=options,
        )
        for url in settings.vllm_base_url
    ]
    return clients[0] if len(clients) == 1 else VLLMGroup(clients, patience=options.retry)
