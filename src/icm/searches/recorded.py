"""Answers that a journal holds: an Ask in front of an Ask, for searches that are functions of their answers alone.

Such a search starts from the beginning every time. What the journal's lines answer is not asked again; from there on
every new answer is asked for and becomes a line. So it goes on where it was stopped, and a finished one is replayed
without a model.

Two events: "evaluation" (a labeling, and its leave-one-out log-odds as "scores") and "questions" (of some claims, after
the labels "shown" or none, the log-odds as "answers"). `U_proposed` is that of the line's labeling, `accepted` whether
it is the best so far, and `U` that of the best so far: in every journal U is where the search stands.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from hashlib import blake2b
from typing import Any

from src.icm.objective import Evaluation, LogOdds
from src.icm.prefix_tree import Layout
from src.icm.problem import Candidate, Problem
from src.icm.searches.lines import labels_of, read_evaluation, read_labels, read_log_odds, scores_of
from src.icm.searches.seam import Ask, Journal, JournalMismatch, Questions, Record, Standing


class RecordedAsk:
    """An Ask that answers from the journal first, then from `ask`.

    standing: the best labeling evaluated so far: of those with most labels the one with the highest U, the first of
    equals. iteration counts evaluations, accepted those that were better than the best before them. questions: how many
    were needed so far, those that the journal answered included.

    A question that was answered is not asked again, nor counted: the same claim after the same labels in one layout.
    """

    def __init__(self, problem: Problem, ask: Ask, journal: Journal) -> None:
        nothing = (None,) * problem.size
        evaluation = problem.objective.evaluate(nothing, {}, problem.consistency)
        self.standing = Standing(0, nothing, problem.new_layout(()), evaluation)
        self.questions = 0
        self._answers: dict[tuple[int, bytes], LogOdds] = {}
        self._answered_in: Layout | None = None
        self._problem = problem
        self._ask = ask
        self._journal = journal
        self._lines = list(enumerate(journal.records, start=1))[::-1]

    def remember(self, candidate: Candidate, log_odds: Mapping[int, LogOdds]) -> None:
        """Answers that are known from elsewhere, of all of the candidate's claims: they are not asked, nor counted."""
        counted = self.questions
        self._keep(candidate, log_odds)
        self.questions = counted

    async def evaluate(self, candidates: Sequence[Candidate], intent: object = None) -> list[Evaluation]:
        """See Ask. Raises JournalMismatch where the journal's next line answers something else."""
        found = [evaluation for each in candidates if (evaluation := self._recorded_evaluation(each)) is not None]
        for candidate, evaluation in zip(candidates, found, strict=False):
            self._keep(candidate, evaluation.log_odds)
            self._stand(candidate, evaluation)
        missing = candidates[len(found) :]
        if not missing:
            return found
        asked = await self._evaluations(missing, intent)
        for candidate, evaluation in zip(missing, asked, strict=True):
            self._keep(candidate, evaluation.log_odds)
            accepted = self._stand(candidate, evaluation)
            line = {"labels": labels_of(candidate.labels), "scores": scores_of(evaluation)}
            worth = {"U_proposed": evaluation.utility, "accepted": accepted}
            now = {
                "predictability": self.standing.evaluation.predictability,
                "inconsistent": self.standing.evaluation.inconsistent,
                "labelled": len(self.standing.labelled),
            }
            await self._write("evaluation", line | worth | now)
        return found + asked

    async def predict(self, claims: Sequence[int], candidate: Candidate, intent: object = None) -> list[LogOdds]:
        """See Ask. Raises JournalMismatch where the journal's next line answers something else."""
        known = self._known(candidate)
        missing = [claim for claim in claims if claim not in known]
        if missing:
            question = {"claims": missing, "shown": labels_of(candidate.labels)}
            answers = self._recorded_answers(question)
            if answers is None:
                answers = await self._ask.predict(missing, candidate, intent)
                await self._write("questions", question | {"answers": answers})
            known |= dict(zip(missing, answers, strict=True))
            self._keep(candidate, known)
        return [known[claim] for claim in claims]

    async def predict_many(self, questions: Sequence[Questions]) -> list[list[LogOdds]]:
        """See Ask; a line for each of `questions` that was not answered before. All must be of one layout.

        Raises JournalMismatch where the journal's next line answers something else.
        """
        keys = [_keys(candidate, claims) for claims, candidate in questions]
        missing: list[Questions] = []
        coming: set[tuple[int, bytes]] = set()
        for (claims, candidate), key_of in zip(questions, keys, strict=True):
            known = self._known(candidate)
            new = [claim for claim in claims if claim not in known and key_of[claim] not in coming]
            if not new:
                continue
            answers = self._recorded_answers({"claims": new, "shown": labels_of(candidate.labels)})
            if answers is not None:
                self._keep(candidate, dict(zip(new, answers, strict=True)))
            else:
                missing.append((new, candidate))
                coming |= {key_of[claim] for claim in new}
        found = await self._ask.predict_many(missing) if missing else []
        for (asked, candidate), answers in zip(missing, found, strict=True):
            await self._write("questions", {"claims": asked, "shown": labels_of(candidate.labels), "answers": answers})
            self._keep(candidate, dict(zip(asked, answers, strict=True)))
        return [
            [self._answers[key_of[claim]] for claim in claims]
            for (claims, _), key_of in zip(questions, keys, strict=True)
        ]

    async def zero_shot(self) -> list[LogOdds]:
        """See Ask. Raises JournalMismatch where the journal's next line answers something else."""
        question: Record = {"claims": list(range(self._problem.size)), "shown": {}}
        found = self._recorded_answers(question)
        if found is None:
            found = await self._ask.zero_shot()
            await self._write("questions", question | {"answers": found})
        self.questions += len(found)
        return found

    async def _evaluations(self, candidates: Sequence[Candidate], intent: object) -> list[Evaluation]:
        """The worth of each, asked in one batch where no answer is known."""
        if not any(self._known(candidate) for candidate in candidates):
            return await self._ask.evaluate(candidates, intent)
        found = []
        for candidate in candidates:
            claims, answers = candidate.layout.questions, self._known(candidate)
            missing = [claim for claim in claims if claim not in answers]
            if missing:
                answers |= dict(zip(missing, await self._ask.predict(missing, candidate, intent), strict=True))
            # Log-odds stand in the order of the questions, as those of an evaluation that was asked whole.
            ordered = {claim: answers[claim] for claim in claims}
            self._keep(candidate, ordered)
            found.append(self._problem.objective.evaluate(candidate.labels, ordered, self._problem.consistency))
        return found

    def _known(self, candidate: Candidate) -> dict[int, LogOdds]:
        """Answers of labelled claims after these labels in this layout, by claim."""
        if candidate.layout is not self._answered_in:
            return {}
        keys = _keys(candidate, candidate.layout.questions)
        return {claim: self._answers[key] for claim, key in keys.items() if key in self._answers}

    def _keep(self, candidate: Candidate, log_odds: Mapping[int, LogOdds]) -> None:
        """Remember answers, and count those that are new."""
        if candidate.layout is not self._answered_in:
            self._answered_in = candidate.layout
            self._answers.clear()
        before = len(self._answers)
        keys = _keys(candidate, log_odds)
        self._answers |= {keys[claim]: value for claim, value in log_odds.items()}
        self.questions += len(self._answers) - before

    def _stand(self, candidate: Candidate, evaluation: Evaluation) -> bool:
        """Count an evaluation; whether it is the best so far."""
        before = self.standing
        first = before.iteration == 0
        labelled = len(evaluation.log_odds), evaluation.utility
        better = first or labelled > (len(before.labelled), before.evaluation.utility)
        if better:
            self.standing = replace(
                before,
                labels=candidate.labels,
                layout=candidate.layout,
                evaluation=evaluation,
                accepted=before.accepted + (not first),
            )
        self.standing = replace(self.standing, iteration=before.iteration + 1)
        return better

    async def _write(self, event: str, line: Record) -> None:
        count = self._problem.num_labels
        record = {"event": event, "iteration": self.standing.iteration} | ({} if count == 2 else {"num_labels": count})
        await self._journal.write(record | line | {"U": self.standing.evaluation.utility}, self.standing)

    def _recorded_evaluation(self, candidate: Candidate) -> Evaluation | None:
        """Its worth by the journal's next line; None where the journal has ended."""
        line = self._next("evaluation")
        if line is None:
            return None
        number, record = line
        try:
            same = read_labels(self._problem, record["labels"]) == {
                claim: label for claim, label in enumerate(candidate.labels) if label is not None
            }
            # Log-odds stand in the order of the questions, which the layout makes.
            if same and [int(claim) for claim in record["scores"]] == list(candidate.layout.questions):
                return read_evaluation(self._problem, candidate.labels, record)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise JournalMismatch(f"line {number} cannot be read ({type(error).__name__}: {error})") from error
        raise JournalMismatch(f"line {number} evaluates other labels than this search, or in another order")

    def _recorded_answers(self, question: Record) -> list[LogOdds] | None:
        """Log-odds by the journal's next line; None where the journal has ended."""
        line = self._next("questions")
        if line is None:
            return None
        number, record = line
        try:
            same = (record["claims"], record["shown"]) == (question["claims"], question["shown"])
            if same and len(record["answers"]) == len(question["claims"]):
                return [read_log_odds(value) for value in record["answers"]]
        except (KeyError, TypeError, ValueError) as error:
            raise JournalMismatch(f"line {number} cannot be read ({type(error).__name__}: {error})") from error
        raise JournalMismatch(f"line {number} answers other questions than this search asks")

    def _next(self, event: str) -> tuple[int, Mapping[str, Any]] | None:
        """The journal's next line and its number."""
        if not self._lines:
            return None
        number, record = self._lines.pop()
        if record.get("num_labels", 2) != self._problem.num_labels:
            raise JournalMismatch(f"line {number} is of other labels")
        if record.get("event") != event:
            raise JournalMismatch(f"line {number} is {record.get('event')!r}, where this search asks for {event!r}")
        return number, record


def _keys(candidate: Candidate, claims: Iterable[int]) -> dict[int, tuple[int, bytes]]:
    """What tells each claim's question from others in this layout: the labels that are shown with it, as a digest."""
    shown = bytearray(len(candidate.labels))
    for other in candidate.layout.demonstrations:
        label = candidate.labels[other]
        shown[other] = 0 if label is None else 1 + label
    found = {}
    for claim in claims:
        kept, shown[claim] = shown[claim], 0
        found[claim] = claim, blake2b(shown, digest_size=16).digest()
        shown[claim] = kept
    return found
