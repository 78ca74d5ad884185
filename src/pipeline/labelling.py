"""One ICM run from a pool of claims to labels on disk: prepare, search, report. The command line sits on top.

`prepare_batches` needs no model; `Labelling` holds what the model adds (tokenized segments) and does the run's work.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from core.llm_api.llm import ModelAPI
from core.llm_api.special_tokens import special_texts
from core.llm_api.tokens import pieces
from core.llm_api.types import EngineIdentity, Segment
from src.icm.consistency import Label, Overview
from src.icm.label_names import Names, counts_of
from src.icm.objective import Evaluation, Objective, accuracy
from src.icm.planner import TokenCosts
from src.icm.problem import Problem, SearchSettings, Stream, generator
from src.icm.prompts import PromptBook
from src.icm.searches.seam import Found, Standing
from src.icm.speculation import Pace
from src.icm.testbeds import BadInput, Claim, ConsistencyMode, Testbed, split_pools
from src.pipeline.continuing import Continued
from src.pipeline.file_kinds import digest_of
from src.pipeline.known import KnownLabels, check_known, gold_seeds, merged
from src.pipeline.precondition import check_precondition, reference_labelings
from src.pipeline.predictions import Prediction, predict
from src.pipeline.scoring import PoolScorer, log_odds_of
from src.pipeline.search import OnRecord, search
from src.results.rows import label_row
from src.results.run_folder import RunFolder

log = logging.getLogger(__name__)

SPECIAL_SHOWN: Final = 5
"""How many claims with special tokens in them are named; the others are counted."""


@dataclass(frozen=True)
class Pool:
    """What a run labels, known before any model is asked.

    rest: other claims of the file, labelled after the search. left_out: how many more are not labelled at all.
    bad_rows: why each unusable row of the file is left out. continued: the run whose labels it starts with. known: the
    labels that are kept, of this pool's claims and of others; the problem has those of the pool. known_digest: of
    them, but for those that are taken over from claims outside the other run's pool, whose digest is
    known_outside_digest. known_elsewhere: the claims outside this pool whose label is known.
    """

    testbed: Testbed
    claims: tuple[Claim, ...]
    rest: tuple[Claim, ...]
    problem: Problem
    data_digest: str
    left_out: int = 0
    bad_rows: tuple[str, ...] = ()
    continued: Continued | None = None
    known: KnownLabels | None = None
    known_digest: str | None = None
    known_outside_digest: str | None = None
    known_elsewhere: tuple[Claim, ...] = ()

    def known_outside(self, at: int) -> Label:
        """The known label of a claim outside the pool, by its place among all; None where it has none."""
        if self.known is None or at < len(self.claims):
            return None
        return self.known.labels.get(self.rest[at - len(self.claims)].row)

    @property
    def gold_to_find(self) -> list[Label]:
        """Gold labels of the claims whose label is not known; None for the others."""
        return [None if self.problem.is_known(at) else claim.gold for at, claim in enumerate(self.claims)]

    @property
    def gold(self) -> list[Label]:
        return [claim.gold for claim in self.claims]

    @property
    def names(self) -> Names:
        """Of the labels, in their order."""
        return self.testbed.space.names

    def overview(self) -> Overview:
        """Its groups and constraints."""
        return self.problem.consistency.overview(self.problem.groups, self.testbed.grouped_by)


def prepare_batches(
    testbed: Testbed,
    claims: list[Claim],
    path: Path,
    *,
    batch_size: int,
    count: int | None = 1,
    consistency: ConsistencyMode,
    objective: Objective,
    settings: SearchSettings,
    continued: Continued | None = None,
    known: KnownLabels | None = None,
    known_outside: KnownLabels | None = None,
    seeds_of_gold: int = 0,
) -> list[Pool]:
    """`count` pools (None: as many as hold all claims) of whole groups, and their constraints, from `settings.seed`.

    Pools have at most batch_size claims and share none; `rest` of each are the claims that are in no pool. continued:
    one pool, which begins with the claims that the other run labelled. known: labels that are kept. known_outside: more
    of them, of claims outside the other run's pool. seeds_of_gold: how many gold labels of each pool are kept, drawn by
    the seed. Raises BadInput where a constraint or the prior cannot be of the testbed's labels, and where known labels
    contradict each other.
    """
    names = testbed.space.names
    if (objective.prior is not None or objective.estimate_prior) and len(names) > 2:
        raise BadInput(f"--prior is the share of one of two labels, and {path} has {len(names)}: {', '.join(names)}")
    if len(claims) < 2:
        raise BadInput(f"{path}: holds one claim; a search needs others to show with each claim, so at least 2")
    objective = replace(objective, num_labels=len(names))
    rng, start, places = generator(settings.seed, Stream.POOL), None, list[int]()
    if continued is None:
        batches = split_pools(claims, batch_size, count, rng, testbed.grouped_by)
    else:
        places = continued.pool(claims, batch_size, rng)
        batches, start = [[claims[at] for at in places]], continued.start_labels(places)
    drawn = {claim.row for batch in batches for claim in batch}
    rest = tuple(claim for claim in claims if claim.row not in drawn)
    digest = digest_of(path)
    known_digest = None if known is None else known.digest(claims)
    pools = []
    for number, batch in enumerate(batches):
        constraints = testbed.consistency(batch, consistency)
        if (complaint := constraints.complaint(len(names))) is not None:
            raise BadInput(f"{path}: {complaint}")
        groups = tuple(claim.group for claim in batch)
        carried = None if continued is None else continued.carried(places, groups, settings)
        kept = merged(known_outside, known)
        if seeds_of_gold:
            of_gold = generator(settings.seed, Stream.KNOWN, number)
            kept = merged(kept, gold_seeds(batch, constraints, seeds_of_gold, of_gold))
        labels = None if kept is None else kept.of(batch)
        if labels is not None:
            check_known(labels, batch, constraints, names)
        problem = Problem(
            groups=groups,
            consistency=constraints,
            objective=objective,
            settings=settings,
            start_labels=start,
            known=labels,
            carried=carried,
        )
        pool = Pool(testbed, tuple(batch), rest, problem, digest, continued=continued)
        inside = {claim.row for claim in batch}
        elsewhere = () if kept is None else (c for c in claims if c.row in kept.labels and c.row not in inside)
        pool = replace(pool, known=kept, known_digest=known_digest, known_elsewhere=tuple(elsewhere))
        outside_digest = None if known_outside is None else known_outside.digest(claims)
        pools.append(replace(pool, known_outside_digest=outside_digest))
    return pools


@dataclass(frozen=True)
class Labelling:
    """A pool, tokenized for one model. The book holds the pool's claims first, then `rest`."""

    pool: Pool
    api: ModelAPI
    identity: EngineIdentity
    book: PromptBook

    @classmethod
    async def open(cls, pool: Pool, api: ModelAPI) -> Labelling:
        """Tokenize every claim once. Raises BadInput where a prompt would not fit the model's context."""
        claims = (*pool.claims, *pool.rest)
        testbed = pool.testbed
        texts = [claim.text for claim in claims]
        book = await PromptBook.open(api, texts, space=testbed.space, separator=testbed.separator)
        labelling = cls(pool, api, api.identity, book)
        labelling._check_context()
        if book.unspelled:
            log.warning(
                "the tokenizer of %s has no token for something in %d of %d claims, the first of them in row %d: the "
                "model does not see it",
                *(api.identity.model, len(book.unspelled), len(claims), claims[book.unspelled[0]].row),
            )
        if special := await special_texts(api, texts, prefix=book.prefix.tokens or (), meant=testbed.template):
            for at, text in list(special.items())[:SPECIAL_SHOWN]:
                log.warning(
                    "row %d contains the text of a special token of this tokenizer: %r; the model reads that token",
                    *(claims[at].row, text),
                )
            if len(special) > SPECIAL_SHOWN:
                log.warning("%d more claims contain one", len(special) - SPECIAL_SHOWN)
        return labelling

    async def token_record(self) -> dict[str, Any]:
        """What the prompts are made of, for run.json and for reading: the prefix, the labels, the separator, and the
        shortest demonstration, each token with what it adds to the text (None where the engine does not say)."""
        shortest = min(range(len(self.pool.claims)), key=lambda claim: _length(self.book.questions[claim]))
        return {
            name: segment.text if segment.tokens is None else await self._pieces(segment.tokens)
            for name, segment in {
                "prefix": self.book.prefix,
                "demonstration": self.book.demonstrations[shortest][True],
                "separator": self.book.separator,
            }.items()
        } | {"labels": self.book.labels.record()}

    async def asks_as_before(self) -> bool:
        """Whether versions without a token_record asked the same: they tokenized each part of a prompt by itself."""
        question = self.book.questions[0]
        by_itself = await self.api.tokenize([question.text, "x"])
        special_too = await self.api.tokenize(["x"], special=True)
        if by_itself is None or special_too is None:
            return True
        [tokens, plain], [special] = by_itself, special_too
        prefix = tuple(special[: len(special) - len(plain)])
        return (tuple(tokens), prefix) == (question.tokens, self.book.prefix.tokens)

    async def _pieces(self, tokens: Sequence[int]) -> list[tuple[int, str | None]]:
        texts = await pieces(self.api, tokens)
        return [(token, None if texts is None else texts[position]) for position, token in enumerate(tokens)]

    def _check_context(self) -> None:
        limit = self.identity.max_model_len
        if limit is None:
            return
        size, room = len(self.pool.claims), limit - 1  # one token is generated
        cap = self.pool.problem.settings.context_cap
        needed = self.book.longest_prompt(size, cap)
        if needed <= room:
            return
        if cap is None:
            asked, fit, flag = f"{size} claims", f"{self.book.claims_that_fit(room, size)} of them fit", "--batch_size"
        else:
            fitting = self.book.cap_that_fits(room, size)
            asked, fit, flag = f"{min(cap, size - 1)} demonstrations", f"{fitting} of the longest fit", "--context_cap"
        raise BadInput(
            f"{asked} need prompts of up to {needed} tokens, and {self.identity.model} has a context of "
            f"{limit}: {fit}. Use a smaller {flag}, or start the server with a larger --max-model-len"
        )

    def without_answers(self) -> Labelling:
        """The same where the answers of the search that it goes on from must be asked anew."""
        problem = self.pool.problem
        carried = None if problem.carried is None else replace(problem.carried, log_odds={})
        return replace(self, pool=replace(self.pool, problem=replace(problem, carried=carried)))

    def planned_for(self, kv_capacity: int | None) -> Labelling:
        """The same with rebuilds planned for an engine whose KV cache holds `kv_capacity` tokens.

        A run keeps the capacity that it began with, also on another server: when the tree is rebuilt decides scores.
        """
        size = len(self.pool.claims)
        costs = TokenCosts(
            demonstrations=tuple(_length(labelled[-1]) for labelled in self.book.demonstrations[:size]),
            questions=tuple(_length(question) for question in self.book.questions[:size]),
            capacity=kv_capacity,
        )
        return replace(self, pool=replace(self.pool, problem=replace(self.pool.problem, costs=costs)))

    def scorer(self) -> PoolScorer:
        return PoolScorer(self.api, self.book, self.pool.problem)

    async def search(self, folder: RunFolder, on_record: OnRecord, lookahead: int | None = None) -> Found:
        return await search(self.api, self.scorer(), folder, on_record, Pace(lookahead))

    async def check(self) -> dict[str, Evaluation]:
        """U of gold (if known), constant, swapped and random labels of the pool: the precondition of ICM. Known
        labels are in all of them."""
        problem = self.pool.problem
        rng = generator(problem.settings.seed, Stream.SEEDS, 1)
        labelings = reference_labelings(self.pool.gold, rng, self.pool.names)
        kept = {name: problem.with_known(labels) for name, labels in labelings.items()}
        return await check_precondition(self.scorer(), problem, kept)

    async def zero_shot(self) -> Prediction:
        """Every claim of the pool asked without demonstrations."""
        return await predict(self.api, self.book, range(len(self.pool.claims)))

    async def predict_unlabelled(self, state: Standing) -> Prediction:
        """The pool's claims that the search left without a label, each as its next proposal would predict it."""
        left = [claim for claim, label in enumerate(state.labels) if label is None]
        # One batch of questions after nearly the same demonstrations: every server takes its part of them.
        prompts = [
            self.book.prompt(claim, state.layout.context(claim), state.labels, position / len(left))
            for position, claim in enumerate(left)
        ]
        scores = await self.api.score(prompts, self.book.labels)
        return Prediction(dict(zip(left, log_odds_of(scores), strict=True)), state.evaluation.offset)

    async def label_rest(self, state: Standing) -> Prediction:
        """The claims outside the pool, asked after the pool's labels as demonstrations (many-shot).

        The demonstrations are in the order that the pool's questions see, so the pool's calibration offset applies.
        """
        size = len(self.pool.claims)
        predicted = await predict(
            self.api,
            self.book,
            range(size, size + len(self.pool.rest)),
            demonstrations=state.layout.demonstrations,
            labels=state.labels,
        )
        return replace(predicted, offset=state.evaluation.offset)

    def label_rows(
        self, state: Standing, predictions: Mapping[str, Prediction], zero_shot: Prediction
    ) -> list[dict[str, Any]]:
        """The rows of labels.jsonl: the pool in its order, then the rest where it was labelled.

        predictions: labels that the search did not give, by what gave them (the rows' `by`).
        """
        first, names, problem = zero_shot.log_odds, self.pool.names, self.pool.problem
        rows = {}
        for claim, log_odds in state.evaluation.log_odds.items():
            by = "known" if problem.is_known(claim) else "icm"
            rows[claim] = label_row(self.pool.claims[claim], state.labels[claim], log_odds, by, first.get(claim), names)
        claims = (*self.pool.claims, *self.pool.rest)
        for by, prediction in predictions.items():
            for claim, label in prediction.labels.items():
                kept = self.pool.known_outside(claim)
                if kept is None:
                    rows[claim] = label_row(
                        claims[claim], label, prediction.log_odds[claim], by, first.get(claim), names
                    )
                else:
                    given = label_row(claims[claim], kept, prediction.log_odds[claim], "known", None, names)
                    rows[claim] = given | {"outside": True}
        return [rows[claim] for claim in sorted(rows)]


def _length(segment: Segment) -> int:
    """Tokens, or characters for an engine asked in text: the planner compares costs only among themselves then."""
    return len(segment) or len(segment.text)


def result_record(
    labelling: Labelling, state: Standing, zero_shot: Prediction, predictions: Mapping[str, Prediction]
) -> dict[str, Any]:
    """The outcome of a run for run.json: counts, not ratios, so that tables can be made from several runs."""
    problem = labelling.pool.problem
    gold = labelling.pool.gold_to_find
    pool = labelling.pool
    outside = enumerate(pool.rest, start=len(pool.claims))
    all_gold = [*gold, *(None if pool.known_outside(at) is not None else claim.gold for at, claim in outside)]
    searched = [label for claim, label in enumerate(state.labels) if label is not None and not problem.is_known(claim)]
    return {
        "iterations": state.iteration,
        "accepted": state.accepted,
        "rebuilds": state.rebuilds,
        "labelled": len(searched),
        **({"known": problem.num_known} if problem.known is not None else {}),
        **counts_of(searched, labelling.pool.names),
        "U": state.evaluation.utility,
        "predictability": state.evaluation.predictability,
        "inconsistent": state.evaluation.inconsistent,
        "icm": accuracy(state.labels, gold),
        "zero_shot": zero_shot.agreement(gold),
        "zero_shot_calibrated": zero_shot.calibrated(problem.objective.prior).agreement(gold),
        "zero_shot_auc": zero_shot.auc(gold),
        "predicted": {by: prediction.agreement(all_gold) for by, prediction in predictions.items()},
    }
