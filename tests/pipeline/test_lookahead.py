"""Questions asked ahead change what a search costs and nothing else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from core.errors import MissingLabel
from core.llm_api.llm import ModelAPI
from core.llm_api.response_cache import ResponseCache
from core.llm_api.types import (
    EngineAnswer,
    EngineIdentity,
    OnAnswer,
    PrefixCacheCounters,
    Prompt,
    Query,
)
from fakes.vllm_server import FALSE, TRUE, hashed_log_odds, label_distribution
from src.icm.annealing import SearchState, explore
from src.icm.consistency import Consistency, Relation
from src.icm.objective import Objective
from src.icm.planner import TokenCosts
from src.icm.problem import Candidate, Problem, SearchSettings
from src.icm.prompts import PromptBook, in_shared_order
from src.icm.searches.seam import Record
from src.icm.speculation import Pace
from src.pipeline.scoring import PoolScorer
from src.pipeline.search import search
from src.results.run_folder import RunFolder
from tests.core.two_labels import pair, two

LABELS = two(TRUE, FALSE)
COST = {"asked", "from_cache", "tokens_sent", "floored", "seconds", "asked_ahead", "ahead_used"}


class ExactEngine:
    """An engine whose answer depends on the prompt's tokens alone. `batches`: the digests of every batch."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.marks: list[int] = []  # how many there were at each journal record
        self.states: list[SearchState] = []  # after each journal record

    async def start(self) -> EngineIdentity:
        return EngineIdentity("exact", "m")

    async def tokenize(self, texts: Sequence[str], *, special: bool = False) -> list[list[int]] | None:
        raise NotImplementedError

    async def score(self, queries: Sequence[Query], *, on_answer: OnAnswer | None = None) -> EngineAnswer:
        prompts = [query.prompt for query in queries]
        self.batches.append([prompt.digest for prompt in prompts])
        answers = [pair(*label_distribution(self.log_odds(prompt.token_ids))) for prompt in prompts]
        answer = EngineAnswer(answers, sum(prompt.num_tokens for prompt in prompts))
        if on_answer is not None:
            on_answer(range(len(prompts)), answer)
        return answer

    def log_odds(self, tokens: Sequence[int]) -> float:
        """Mostly the claim's own, the last token but one of a question, and partly the whole context's."""
        return (2.0 if tokens[-1] % 3 else -2.0) + 0.4 * hashed_log_odds(tokens)

    async def prefix_cache(self) -> PrefixCacheCounters | None:
        return None

    async def kv_cache_tokens(self) -> int | None:
        return None

    async def aclose(self) -> None:
        pass


class Greedy(Pace):
    """As many speculative evaluations as are allowed, whatever a batch takes."""

    def evaluations(self, tokens: float, ahead: Sequence[float]) -> int:
        return len(ahead)


def make_problem(size: int = 20, relation: Relation | None = Relation.EXACTLY_ONE, **settings: Any) -> Problem:
    groups = tuple(str(i // 2) for i in range(size))
    consistency = Consistency([]) if relation is None else Consistency.of_groups(groups, lambda i, j: relation)
    defaults: dict[str, Any] = {"seed": 5, "num_seed": 4, "patience": 12, "K": 150}
    costs = TokenCosts((4,) * size, (2,) * size, settings.pop("capacity", None))
    return Problem(groups, consistency, Objective(20.0), SearchSettings(**(defaults | settings)), costs)


class Stopped(Exception):
    pass


class FussyEngine(ExactEngine):
    """Refuses every batch with a question that is not in `allowed`."""

    def __init__(self, allowed: set[str]) -> None:
        super().__init__()
        self.allowed = allowed
        self.refused = 0

    async def score(self, queries: Sequence[Query], *, on_answer: OnAnswer | None = None) -> EngineAnswer:
        if any(query.prompt.digest not in self.allowed for query in queries):
            self.refused += 1
            raise MissingLabel("a label is not among the top 20")
        return await super().score(queries, on_answer=on_answer)


async def run(
    problem: Problem,
    folder: Path,
    pace: Pace,
    *,
    stop_after: int | None = None,
    cache: Path | None = None,
    engine: ExactEngine | None = None,
) -> tuple[SearchState, list[Record], ExactEngine]:
    engine = engine or ExactEngine()
    book = PromptBook.build(
        [f"claim {i}" for i in range(problem.size)],
        LABELS,
        tokens=[[1000 + i // 7, 2000 + i] for i in range(problem.size)],
        prefix_tokens=[1],
        separator_tokens=[2],
    )
    count = 0

    def on_record(state: SearchState, record: Record) -> None:
        nonlocal count
        count += 1
        engine.states.append(state)
        engine.marks.append(len(engine.batches))
        if count == stop_after:
            raise Stopped

    async with ModelAPI(engine, cache=None if cache is None else ResponseCache(cache)) as api:
        with RunFolder(folder) as run_folder:
            scorer = PoolScorer(api, book, problem)
            state = await search(api, scorer, run_folder, on_record, pace)
            return state, run_folder.read_log(), engine


def decisions(records: Sequence[Record]) -> list[Record]:
    return [{key: value for key, value in record.items() if key not in COST} for record in records]


def total(records: Sequence[Record], key: str) -> int:
    return sum(record[key] for record in records)


SEARCHES: dict[str, dict[str, Any]] = {
    "repairs": {},
    "no constraints": {"relation": None},
    "at most one": {"relation": Relation.AT_MOST_ONE},
    "many acceptances": {"initial_T": 1000.0, "final_T": 1000.0, "K": 60},
    "many refusals": {"initial_T": 0.01, "stop": "K"},
    "rebuilds": {"max_tail": 3},
    "planned rebuilds": {"capacity": 1500, "initial_T": 100.0},
    "upstream's order": {"layout": "upstream"},
    "anchors": {"anchors": 2, "max_tail": 4},
    "no seeds": {"num_seed": 0},
}


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name", SEARCHES)
async def test_no_decision_depends_on_how_far_the_search_looks_ahead(name: str, seed: int, tmp_path: Path) -> None:
    problem = make_problem(seed=seed, **SEARCHES[name])
    state, alone, engine = await run(problem, tmp_path / "alone", Pace(0))
    assert total(alone, "asked_ahead") == 0
    for number, pace in enumerate((Pace(1), Pace(4), Pace(16), Pace(), Greedy(4), Greedy())):
        with_it, records, busy = await run(problem, tmp_path / str(number), pace)
        assert with_it == state
        assert decisions(records) == decisions(alone)
        assert len(busy.batches) < len(engine.batches)
        assert 0 < total(records, "ahead_used") <= total(records, "asked_ahead")
        # What a search alone asks is asked here too, and nothing beside it that was not asked ahead.
        needed = {digest for batch in engine.batches for digest in batch}
        asked = {digest for batch in busy.batches for digest in batch}
        assert needed <= asked
        assert len(asked - needed) <= total(records, "asked_ahead") - total(records, "ahead_used")


async def test_a_question_asked_ahead_that_cannot_be_answered_stops_nothing(tmp_path: Path) -> None:
    problem = make_problem(seed=1)
    state, alone, engine = await run(problem, tmp_path / "alone", Pace(0))
    fussy = FussyEngine({digest for batch in engine.batches for digest in batch})
    with_it, records, _ = await run(problem, tmp_path / "ahead", Greedy(8), engine=fussy)
    assert fussy.refused > 3
    assert with_it == state
    assert decisions(records) == decisions(alone)
    fussy.allowed.remove(engine.batches[5][0])
    with pytest.raises(MissingLabel):
        await run(problem, tmp_path / "needed", Greedy(8), engine=fussy)


async def test_the_searches_above_hold_all_that_can_happen(tmp_path: Path) -> None:
    seen: Counter[str] = Counter()
    for name, settings in SEARCHES.items():
        _, records, _ = await run(make_problem(seed=1, **settings), tmp_path / name, Pace())
        for record in records:
            seen[record["event"]] += 1
            if record["event"] == "step":
                seen["accepted" if record["accepted"] else "unchanged"] += 1
                seen["repaired"] += record["tried"] > 1
                seen["refused"] += not record["accepted"] and record["U_proposed"] is not None
                seen["as it was"] += record["U_proposed"] is None
    for event in ("start", "step", "rebuild", "mirror", "accepted", "unchanged", "repaired", "refused", "as it was"):
        assert seen[event] >= 3, event


async def test_where_all_is_accepted_an_iteration_is_one_batch(tmp_path: Path) -> None:
    settings = {"relation": None, "initial_T": 1e9, "final_T": 1e9, "K": 16, "mirror": False, "stop": "K"}
    _, _, engine = await run(make_problem(seed=1, **settings), tmp_path / "a", Pace(0))
    _, records, busy = await run(make_problem(seed=1, **settings), tmp_path / "b", Pace())
    evaluated = sum(record.get("tried", 0) > 0 for record in records)
    rebuilt = sum(record["event"] == "rebuild" for record in records)
    assert len(engine.batches) >= 1.5 * (evaluated + rebuilt)
    # After a flip the next prediction computes a whole context, which may cost more than the batch that it saves.
    flips = sum(record.get("tried", 0) > 0 and record["current"] is not None for record in records)
    assert flips < evaluated / 2
    assert len(busy.batches) <= 1 + 1 + evaluated + rebuilt + flips  # the seeds, the first prediction


async def test_where_all_is_refused_speculative_evaluations_save_most_batches(tmp_path: Path) -> None:
    settings = {"initial_T": 0.01, "final_T": 0.01, "K": 60, "stop": "K", "num_seed": 8, "mirror": False}
    _, alone, engine = await run(make_problem(64, seed=1, **settings), tmp_path / "a", Pace(0))
    _, records, busy = await run(make_problem(64, seed=1, **settings), tmp_path / "b", Greedy(8))
    assert decisions(records) == decisions(alone)
    assert len(busy.batches) < 0.6 * len(engine.batches)
    wasted = total(records, "asked_ahead") - total(records, "ahead_used")
    changes = sum(bool(record.get("accepted")) for record in records)
    # A change makes stale at most what was asked ahead at once: 8 evaluations with repairs, and predictions.
    assert wasted <= (changes + 1) * 8 * (4 * 64 + 2)


@pytest.mark.parametrize("paces", [(0, 16), (16, 0), (4, None)])
async def test_a_stopped_search_goes_on_with_another_lookahead(
    paces: tuple[int | None, int | None], tmp_path: Path
) -> None:
    problem = make_problem(max_tail=3)
    whole, alone, _ = await run(problem, tmp_path / "whole", Pace(0))
    for stop_after in (1, 2, 7, 20, 33):
        folder = tmp_path / str(stop_after)
        with pytest.raises(Stopped):
            await run(problem, folder, Greedy(paces[0]), stop_after=stop_after)
        state, records, _ = await run(problem, folder, Greedy(paces[1]))
        assert state == whole
        assert decisions(records) == decisions(alone)


async def test_between_changes_no_prompt_is_sent_twice_without_a_response_cache(tmp_path: Path) -> None:
    """Refused claims come up again and again; the memo knows their answers for as long as nothing changes."""
    for lookahead in (0, 4):
        problem = make_problem(initial_T=0.01, stop="K", num_seed=12)
        _, records, engine = await run(problem, tmp_path / str(lookahead), Greedy(lookahead))
        last = max(n for n, record in enumerate(records) if record.get("accepted") or record["event"] == "start")
        claims = [record["claim"] for record in records[last + 1 :] if record["event"] == "step" and record["tried"]]
        assert len(claims) > len(set(claims))
        asked = Counter(digest for batch in engine.batches[engine.marks[last] :] for digest in batch)
        assert max(asked.values()) == 1


async def test_a_repeated_run_sends_nothing(tmp_path: Path) -> None:
    """What is asked ahead depends on the clock; it is never a reason to send a batch."""
    _, first, _ = await run(make_problem(), tmp_path / "a", Greedy(8), cache=tmp_path / "r.sqlite")
    _, second, engine = await run(make_problem(), tmp_path / "b", Pace(), cache=tmp_path / "r.sqlite")
    assert decisions(second) == decisions(first)
    assert engine.batches == []
    assert total(second, "asked_ahead") == 0


async def test_a_claim_predicted_as_it_is_costs_no_batch(tmp_path: Path) -> None:
    """A labelled claim's question is part of the last evaluation, so its prediction is known."""
    _, records, _ = await run(make_problem(), tmp_path / "a", Pace(0))
    as_it_was = [record for record in records if record["event"] == "step" and record["U_proposed"] is None]
    assert len(as_it_was) > 5
    assert all(record["asked"] == 0 and record["tried"] == 0 for record in as_it_was)


def test_alternatives_share_all_but_the_last_demonstration_and_none_is_evaluated_twice() -> None:
    problem = make_problem(16, num_seed=0)
    layout = problem.new_layout(range(0, 16, 3))
    labels = tuple(bool(i % 2) if i % 3 == 0 else None for i in range(16))
    new = 4  # of a group with nobody else
    start = Candidate((*labels[:new], True, *labels[new + 1 :]), layout.append(new))
    other = Candidate((*labels[:new], False, *labels[new + 1 :]), start.layout)
    for claim in layout.questions:
        context = start.layout.context(claim)
        if problem.groups[claim] != problem.groups[new]:
            assert context[-1] == new
        differing = [i for i, shown in enumerate(context) if start.labels[shown] != other.labels[shown]]
        assert differing == [context.index(new)]
    seen: list[Any] = []
    labels = (*(not i % 2 for i in range(15)), True)
    broken = tuple(label if i > 5 else True for i, label in enumerate(labels))
    known = {labels: problem.objective.evaluate(labels, dict.fromkeys(range(16), 0.0), problem.consistency)}
    exploration = explore(problem, Candidate(broken, problem.new_layout(range(16))), 0, known)
    batch = next(exploration, None)
    while batch is not None:
        seen += [candidate.labels for candidate in batch]
        worth = [
            problem.objective.evaluate(each.labels, dict.fromkeys(range(16), 0.1), problem.consistency)
            for each in batch
        ]
        try:
            batch = exploration.send(worth)
        except StopIteration:
            break
    assert len(seen) == len(set(seen)) > 3
    assert labels not in seen


def test_prompts_that_share_a_prefix_are_asked_together() -> None:
    """Two labelings that differ in the newest label alternate, question by question."""
    problem = make_problem(16, None)
    tokens = [[1000 + i // 7, 2000 + i] for i in range(16)]
    book = PromptBook.build([str(i) for i in range(16)], LABELS, tokens=tokens, separator_tokens=[2])
    layout = problem.new_layout(range(12)).append(12)
    candidates = [Candidate((True,) * 12 + (label,) + (None,) * 3, layout) for label in (True, False)]
    prompts = [book.prompt(q, c.layout.context(q), c.labels) for c in candidates for q in layout.questions[:12]]
    ordered = in_shared_order(prompts)
    assert sorted(p.digest for p in ordered) == sorted(p.digest for p in prompts)

    def computed(sequence: Sequence[Prompt]) -> int:
        """Segments that a cache of the last prompt alone would compute."""
        last: tuple[Any, ...] = ()
        new = 0
        for prompt in sequence:
            shared = next((i for i, (a, b) in enumerate(zip(last, prompt.segments, strict=False)) if a != b), len(last))
            new += len(prompt.segments) - shared
            last = prompt.segments
        return new

    trie = {prompt.segments[:end] for prompt in prompts for end in range(1, len(prompt.segments) + 1)}
    assert computed(ordered) == len(trie) < computed(prompts)
    texts = [Prompt(tuple(type(s)(s.text) for s in prompt.segments)) for prompt in prompts]
    assert sorted(p.text for p in in_shared_order(texts)) == [p.text for p in in_shared_order(texts)]
