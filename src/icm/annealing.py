"""Annealing as a state machine: state + random numbers + scores -> proposals and the next state.

Algorithm 1 of Wen et al. 2025 with its consistency repair (algorithm 2). Nothing here asks a model: `propose` names a
claim, `explore` yields labelings to evaluate, `advance` applies an outcome, live or read back from a journal. Random
numbers of iteration n come from a generator seeded by (seed, n) only. `searches/annealing.py` drives it.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from src.icm.consistency import Constraint, Labels, all_labels
from src.icm.objective import Evaluation, LogOdds, label_of, sureness
from src.icm.planner import evaluation_tokens, extra_tokens_of_tail, pays_to_rebuild, relaid_tokens
from src.icm.prefix_tree import Layout
from src.icm.problem import Candidate, Problem, Stream, generator
from src.icm.searches.seam import Standing

SIBLING_WEIGHT = 100  # of an unlabelled claim whose group has a labelled member; others have 1 (published code)


@dataclass(frozen=True, slots=True)
class SearchState(Standing):
    """The state of annealing. unchanged: proposals in a row that changed nothing. refused: their claims.

    spent_on_tail: extra tokens computed because of the tail since the last rebuild (see planner). changes_since_asked:
    changes accepted since all log-odds were last asked; above 0 with local_gain only.
    """

    unchanged: int = 0
    refused: frozenset[int] = frozenset()
    mirror_tried: bool = False
    spent_on_tail: int = 0
    changes_since_asked: int = 0

    def asks_next(self, problem: Problem) -> str | None:
        """See Standing."""
        if finished(problem, self):
            return None
        if wants_mirror(problem, self):
            return f"asking all with {'every label flipped' if problem.num_labels == 2 else 'two labels swapped'}"
        return "asking all in a new order" if wants_rebuild(problem, self) else None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one iteration asked, found and decided; everything that `advance` and a journal need.

    labels, evaluation: the accepted labeling and its worth; None where nothing changed.
    proposed_utility: U of the best labeling tried, None where the predicted label was the current one.
    spent_on_tail: extra tokens that trying them cost because of the tail (see `extra_tokens`).
    pieced_together: whether log-odds of the evaluation are those of an earlier one (see `local_evaluation`).
    """

    claim: int
    log_odds: LogOdds
    predicted: int
    temperature: float
    tried: int = 0
    proposed_utility: float | None = None
    probability: float | None = None
    labels: Labels | None = None
    evaluation: Evaluation | None = None
    spent_on_tail: int = 0
    pieced_together: bool = False

    @property
    def accepted(self) -> bool:
        return self.labels is not None


def proposal_weights(labels: Labels, groups: Sequence[str], refused: frozenset[int] = frozenset()) -> np.ndarray:
    """Sampling weights, shape [N]: SIBLING_WEIGHT for unlabelled claims with a labelled group member, else 1.

    A claim refused since the last change weighs 1, so that the others have their turn.
    """
    started = {group for group, label in zip(groups, labels, strict=True) if label is not None}
    return np.array(
        [
            SIBLING_WEIGHT if label is None and group in started and claim not in refused else 1
            for claim, (group, label) in enumerate(zip(groups, labels, strict=True))
        ],
        dtype=np.float64,
    )


def propose(problem: Problem, state: SearchState) -> int:
    """The claim whose label iteration `state.iteration` reconsiders (with best_of, the first of them)."""
    return proposals(problem, state)[0]


def proposals(problem: Problem, state: SearchState) -> tuple[int, ...]:
    """The `best_of` different claims whose labels iteration `state.iteration` predicts; never one of a known label."""
    weights = proposal_weights(state.labels, problem.groups, state.refused)
    if problem.known is not None:
        weights[[claim for claim in range(problem.size) if problem.is_known(claim)]] = 0.0
    if problem.carried is not None:
        weights = _what_is_new(problem, state, weights)
    rng = generator(problem.settings.seed, Stream.STEP, state.iteration)
    share = weights / weights.sum()
    count = min(problem.settings.best_of, int(np.count_nonzero(weights)))
    if count == 1:
        return (int(rng.choice(problem.size, p=share)),)
    return tuple(rng.choice(problem.size, size=count, replace=False, p=share).tolist())


def _what_is_new(problem: Problem, state: SearchState, weights: np.ndarray) -> np.ndarray:
    """The weights of a search that goes on from another one's end: of claims that are new and not yet tried, else of
    all but those that the other one had settled."""
    resting = problem.resting(state.labels)
    awake = weights * np.array([claim not in resting for claim in range(problem.size)])
    new = awake * np.array([label is None and c not in state.refused for c, label in enumerate(state.labels)])
    return next((found for found in (new, awake) if found.any()), weights)


def choose(problem: Problem, state: SearchState, log_odds: Mapping[int, LogOdds]) -> int:
    """The proposed claim with the surest prediction of those that change a label; the first where none does.

    log_odds: of each proposed claim, in the order proposed, nats.
    """
    changes = [c for c, value in log_odds.items() if predicted_label(problem, state, value) != state.labels[c]]
    return (
        max(changes, key=lambda c: sureness(log_odds[c], state.evaluation.offset)) if changes else next(iter(log_odds))
    )


def decides_by_itself(problem: Problem, state: SearchState, claim: int, labels: Labels) -> bool:
    """Whether a proposal needs no evaluation of the pool: with local_gain, a new claim that breaks no constraint.

    Labels are never *changed* on an estimate: the conditionals of a language model come from no common distribution, so
    flips by each claim's own gain can go round in circles for ever.
    """
    if not problem.settings.local_gain or state.labels[claim] is not None:
        return False
    return problem.consistency.count(labels) == state.evaluation.inconsistent


def local_evaluation(
    problem: Problem, state: SearchState, labels: Labels, log_odds: Mapping[int, LogOdds]
) -> Evaluation:
    """U of `labels` if no other claim's log-odds changed: those of the last evaluation, and the given ones (nats)."""
    known = {**state.evaluation.log_odds, **log_odds}
    asked = {claim: value for claim, value in known.items() if labels[claim] is not None}
    return problem.objective.evaluate(labels, asked, problem.consistency)


def predicted_label(problem: Problem, state: SearchState, log_odds: LogOdds) -> int:
    """argmax P(y | x, D without x), against the pool's mean log-odds where the objective is calibrated."""
    return label_of(log_odds, state.evaluation.offset)


def proposal(state: SearchState, claim: int, label: int) -> Candidate:
    """The labeling to evaluate if `claim` is given `label`: a new claim's demonstration is the last one."""
    layout = state.layout if state.labels[claim] is not None else state.layout.append(claim)
    return Candidate(flipped(state.labels, {claim: label}), layout)


def flipped(labels: Labels, changes: Mapping[int, int]) -> Labels:
    """`labels` with some of them replaced."""
    return tuple(changes.get(i, label) for i, label in enumerate(labels))


def explore(
    problem: Problem, start: Candidate, iteration: int, known: Mapping[Labels, Evaluation] | None = None
) -> Generator[list[Candidate], list[Evaluation], tuple[Candidate, Evaluation, int]]:
    """Repair the inconsistencies of `start`: yields labelings to evaluate, is sent their worth, returns the best.

    Every round takes a broken constraint of the best labeling so far and tries every assignment that it allows. The
    repair ends when nothing is broken, when every broken constraint was tried, or after consistency_fix_K rounds.
    Assignments that change a known label are not tried. `known` evaluations are not asked again. Also returns how many
    were asked.
    """
    rng = np.random.default_rng([problem.settings.seed, Stream.STEP, iteration, 1])
    worth = dict(known or {})
    tried: set[tuple[Labels, Constraint]] = set()
    best, contenders, asked = start.labels, [start.labels], 0
    for repair in range(problem.settings.consistency_fix_K + 1):
        broken = [c for c in problem.consistency.broken(best) if (best, c) not in tried]
        last = not broken or repair == problem.settings.consistency_fix_K
        if not last:
            constraint = broken[int(rng.integers(len(broken)))]
            tried.add((best, constraint))
            repaired = (flipped(best, changes) for changes in constraint.repairs(best, problem.num_labels))
            contenders += [labels for labels in repaired if problem.with_known(labels) == labels]
        unknown = [labels for labels in dict.fromkeys(contenders) if labels not in worth]
        if unknown:
            evaluations = yield [Candidate(labels, start.layout) for labels in unknown]
            worth.update(zip(unknown, evaluations, strict=True))
            asked += len(unknown)
        # max() keeps the first of equals: the proposal as it was made, then the earlier repair.
        best = max(contenders, key=lambda labels: worth[labels].utility)
        contenders = [best]
        if last:
            break
    return Candidate(best, start.layout), worth[best], asked


def decide(problem: Problem, state: SearchState, utility: float) -> tuple[bool, float, float]:
    """(accepted, acceptance probability, temperature): Metropolis on U, without overflow for large gains."""
    temperature = problem.temperature(state.iteration, state.accepted)
    gain = utility - state.evaluation.utility
    probability = 1.0 if gain >= 0 else math.exp(gain / temperature)
    draw = np.random.default_rng([problem.settings.seed, Stream.STEP, state.iteration, 2]).random()
    return bool(draw < probability), probability, temperature


def advance(problem: Problem, state: SearchState, outcome: Outcome) -> SearchState:
    """The state after one iteration."""
    if outcome.labels is None or outcome.evaluation is None:
        return replace(
            state,
            iteration=state.iteration + 1,
            unchanged=state.unchanged + 1,
            refused=state.refused | {outcome.claim},
            spent_on_tail=state.spent_on_tail + outcome.spent_on_tail,
        )
    layout = state.layout
    if state.labels[outcome.claim] is None:
        layout = layout.append(outcome.claim)
    return replace(
        state,
        iteration=state.iteration + 1,
        labels=outcome.labels,
        layout=layout,
        evaluation=outcome.evaluation,
        accepted=state.accepted + 1,
        unchanged=0,
        refused=frozenset(),
        spent_on_tail=state.spent_on_tail + outcome.spent_on_tail,
        changes_since_asked=state.changes_since_asked + 1 if outcome.pieced_together else 0,
    )


def extra_tokens(problem: Problem, state: SearchState, labelings: Iterable[Labels]) -> int:
    """Tokens that evaluating `labelings` costs more than in a rebuilt layout (planner.extra_tokens_of_tail)."""
    return sum(extra_tokens_of_tail(problem.costs, state.layout, _relabelled(state, labels)) for labels in labelings)


def cost(problem: Problem, state: SearchState, labelings: Iterable[Labels]) -> float:
    """About how many tokens a prefix-caching server computes to evaluate `labelings`."""
    return sum(
        relaid_tokens(problem.costs, state.layout, _relabelled(state, labels))
        + evaluation_tokens(problem.costs, state.layout)
        for labels in labelings
    )


def _relabelled(state: SearchState, labels: Labels) -> list[int]:
    return [claim for claim in state.labelled if labels[claim] != state.labels[claim]]


def wants_rebuild(problem: Problem, state: SearchState) -> bool:
    """Whether the tail costs more than a rebuild (see planner), or is as long as `max_tail`.

    With context_cap or local_gain the layout is rebuilt whenever the number of labelled claims has doubled. With
    local_gain, pieced-together log-odds are also asked anew before the search ends or tries the mirror.
    """
    settings = problem.settings
    if state.changes_since_asked and settled(problem, state):
        return True
    if settings.max_tail is not None and state.layout.tail_length >= settings.max_tail:
        return True
    if settings.context_cap is not None or settings.local_gain:
        return len(state.layout.questions) >= max(1, 2 * state.layout.built_with)
    return pays_to_rebuild(problem.costs, state.layout, state.spent_on_tail)


def rebuilt_layout(problem: Problem, state: SearchState) -> Layout:
    """The layout of the next rebuild. Its scores replace the state's, so that U is compared within one layout."""
    return problem.new_layout(state.labelled, state.rebuilds + 1, labels=state.labels)


def rebuild(state: SearchState, layout: Layout, evaluation: Evaluation) -> SearchState:
    """The state in a new layout: same labels, scores as that layout gives them."""
    return replace(
        state, layout=layout, evaluation=evaluation, rebuilds=state.rebuilds + 1, spent_on_tail=0, changes_since_asked=0
    )


def settled(problem: Problem, state: SearchState) -> bool:
    """K iterations, or `patience` proposals in a row without a change once no claim is left to try.

    A claim is left to try while it has no label and was not proposed since the last change: U is a mean, so a search
    may refuse to take in a claim that it cannot predict, and would otherwise propose it until K.
    """
    settings = problem.settings
    if state.iteration >= settings.K or problem.num_known == problem.size:
        return True
    if settings.stop == "K" or state.unchanged < settings.patience:
        return False
    tried = state.refused | problem.resting(state.labels)
    return all(label is not None or claim in tried for claim, label in enumerate(state.labels))


def wants_mirror(problem: Problem, state: SearchState) -> bool:
    """Whether the settled search should try its `mirrors`.

    A model that learns from its context predicts consistently permuted labels nearly as well as the right ones, so the
    search has a second basin, or K! of them, and changes of single labels cannot leave one. Not in the paper; decided
    by U alone. With two labels it is tried once a run, since a second swap undoes the first. With more labels it is
    tried every time the search settles, until no swap is better.
    """
    if problem.keeps_side(state.labels):
        return False
    wanted = problem.settings.mirror and not state.mirror_tried and bool(state.labelled)
    settles = wanted and not state.changes_since_asked and settled(problem, state)
    return settles and bool(mirrors_of(problem, state.labels))


def mirrors(labels: Labels, num_labels: int) -> tuple[Labels, ...]:
    """The K (K - 1) / 2 labelings that swap two labels everywhere; with two labels the one with every label flipped.

    Repeated swaps reach every permutation, which cyclic shifts do not, and a model most likely confuses two labels.
    """
    return tuple(swapped(labels, one, other) for one, other in combinations(all_labels(num_labels), 2))


def mirrors_of(problem: Problem, labels: Labels) -> tuple[Labels, ...]:
    """The `mirrors` of a search's labels. Known labels stay as they are, so that a swap of the others may break
    constraints with them: then as few others as possible are changed too (Problem.likeliest). A mirror that is the same
    as `labels` is none."""
    found = mirrors(labels, problem.num_labels)
    if problem.known is None:
        return found
    turned = (_consistent(problem, problem.with_known(each)) for each in found)
    return tuple(dict.fromkeys(each for each in turned if each != labels))


def _consistent(problem: Problem, labels: Labels) -> Labels:
    """The nearest labels that break no constraint; claims without a label get none."""
    count = problem.num_labels
    margins = [tuple(0.0 if label is None else float(label == other) for other in range(count)) for label in labels]
    nearest = problem.likeliest(margins)
    return tuple(None if label is None else near for label, near in zip(labels, nearest, strict=True))


def swapped(labels: Labels, one: int, other: int) -> Labels:
    """`labels` with `one` and `other` in each other's place."""
    turned = {one: other, other: one}
    return tuple(None if label is None else turned.get(label, label) for label in labels)


def mirrored_labels(labels: Labels) -> Labels:
    """`labels`, of two, with every one flipped."""
    return swapped(labels, False, True)


def mirror(state: SearchState, evaluation: Evaluation | None, labels: Labels | None = None) -> SearchState:
    """The state after its mirrors were tried.

    evaluation, labels: of the accepted one; evaluation is None where none was better, and labels can be left out where
    there are two labels and so one mirror.
    """
    if evaluation is None:
        return replace(state, mirror_tried=True)
    return replace(
        state,
        labels=mirrored_labels(state.labels) if labels is None else labels,
        evaluation=evaluation,
        unchanged=0,
        refused=frozenset(),
        mirror_tried=evaluation.num_labels == 2,
    )


def finished(problem: Problem, state: SearchState) -> bool:
    """Whether it has settled, with log-odds that were all asked of one labeling and the mirror tried if wanted."""
    return settled(problem, state) and not state.changes_since_asked and not wants_mirror(problem, state)
