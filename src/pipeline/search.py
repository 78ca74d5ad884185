"""A search with a model to ask and its journal in a run's folder; a stopped search goes on where its journal ends.

The problem's settings say which search it is (src/icm/searches/).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from core.llm_api.llm import ModelAPI
from core.llm_api.types import PrefixCacheCounters
from src.icm.searches import search_named
from src.icm.searches.seam import Found, JournalMismatch, Record, Standing
from src.icm.speculation import Pace
from src.icm.testbeds import BadInput
from src.pipeline.lookahead import Lookahead
from src.pipeline.scoring import PoolScorer
from src.results.run_folder import RunFolder

OnRecord = Callable[[Standing, Record], None]


class Meter:
    """What an iteration cost: seconds, tokens sent, and tokens computed and cached where the engine says.

    Questions asked ahead count for the iteration that asked them, `ahead_used` for the one that came to need them.
    """

    def __init__(self, api: ModelAPI, lookahead: Lookahead) -> None:
        self._api = api
        self._lookahead = lookahead
        self._ahead = 0, 0
        self._stats = api.stats.as_dict()
        self._cache: PrefixCacheCounters | None = None
        self._time = time.perf_counter()

    async def start(self) -> Meter:
        self._cache = await self._api.prefix_cache()
        return self

    async def lap(self) -> Record:
        """Cost since the last lap.

        Where the engine does not say what each batch found in its cache, its counters do, which on a shared server
        include other users' tokens.
        """
        stats = self._api.stats.as_dict()
        cost: Record = {
            "asked": stats["asked"] - self._stats["asked"],
            "from_cache": stats["cache_hits"] - self._stats["cache_hits"],
            "tokens_sent": stats["prompt_tokens"] - self._stats["prompt_tokens"],
            "floored": stats["floored"] - self._stats["floored"],
            "asked_ahead": self._lookahead.asked - self._ahead[0],
            "ahead_used": self._lookahead.used - self._ahead[1],
        }
        self._ahead = self._lookahead.asked, self._lookahead.used
        if stats["untold_tokens"] == self._stats["untold_tokens"]:
            if cost["tokens_sent"]:
                cost["tokens_cached"] = stats["cached_tokens"] - self._stats["cached_tokens"]
                cost["tokens_computed"] = cost["tokens_sent"] - cost["tokens_cached"]
                self._cache = None  # the counters were not read here, so the next difference would be too large
        else:
            now_cached = await self._api.prefix_cache()
            if now_cached is not None and self._cache is not None:
                delta = now_cached - self._cache
                if delta.hits >= 0 and delta.computed >= 0:  # else the server was started anew
                    cost["tokens_cached"], cost["tokens_computed"] = delta.hits, delta.computed
            self._cache = now_cached
        now = time.perf_counter()
        cost["seconds"] = round(now - self._time, 3)
        self._stats, self._time = stats, now
        return cost


class RunJournal:
    """A search's Journal in a run's folder: each line, with its cost since the one before, is on disk before the search
    goes on. on_record: called with every new line."""

    def __init__(self, folder: RunFolder, meter: Meter, ahead: Lookahead, on_record: OnRecord) -> None:
        self.records: Sequence[Record] = folder.read_log()
        self._folder = folder
        self._meter = meter
        self._ahead = ahead
        self._on_record = on_record

    async def write(self, record: Record, standing: Standing) -> None:
        """See Journal."""
        self._ahead.learn(record)
        record = record | await self._meter.lap()
        self._folder.append_log(record)
        self._on_record(standing, record)


async def search(
    api: ModelAPI, scorer: PoolScorer, folder: RunFolder, on_record: OnRecord, pace: Pace | None = None
) -> Found:
    """Label the pool. Goes on where `folder`'s journal ends; every iteration is journaled before the next begins.

    pace: how far to ask ahead, by default adapting. It changes costs, never decisions. Raises BadInput where the
    journal is not one of this search.
    """
    problem = scorer.problem
    ahead = Lookahead(api, scorer, pace or Pace())
    journal = RunJournal(folder, await Meter(api, ahead).start(), ahead, on_record)
    try:
        return await search_named(problem.settings.search).run(problem, ahead, journal)
    except JournalMismatch as error:
        raise BadInput(
            f"{folder.log_path}: is not a journal of this search: {error}. "
            f"Move {folder.path} away, or choose another --run"
        ) from None
