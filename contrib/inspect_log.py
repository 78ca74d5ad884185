"""A run as a log of inspect_ai, written by that library: `inspect view` and its readers open it like any other."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from inspect_ai.log import (
    EvalConfig,
    EvalDataset,
    EvalLog,
    EvalMetric,
    EvalPlan,
    EvalResults,
    EvalSample,
    EvalScore,
    EvalSpec,
    EvalStats,
    write_eval_log,
)
from inspect_ai.model import ChatMessageAssistant, ChatMessageUser, ModelOutput, ModelUsage
from inspect_ai.scorer import CORRECT, INCORRECT, NOANSWER, Score

from src.icm.label_names import written_odds
from src.results.provenance import provenance_of
from src.results.run_record import LabelledClaim, RunRecord, probability

SCORER: Final = "icm"


def write_log(path: Path, run: RunRecord, claims: Sequence[LabelledClaim]) -> int:
    """Write the claims as samples of one evaluation; returns how many.

    path: FILE.eval, or FILE.json for that format. A sample's input is the question as the run asked it, its answer the
    label, its target gold. Its score is C or I where there is gold that the label can be compared with, N where there
    is none, where the label was given, and where it is withheld.
    """
    write_eval_log(log_of(run, claims), str(path))
    return len(claims)


def log_of(run: RunRecord, claims: Sequence[LabelledClaim]) -> EvalLog:
    """The log as inspect_ai's value."""
    known = provenance_of(run, claims)
    key = hashlib.sha256(f"{run.name}\n{run.started}".encode()).hexdigest()[:22]
    started, finished = _utc(run.started), _utc(run.finished)
    samples = list(_samples(run, claims))
    return EvalLog(
        status="success" if run.finished else "started",
        eval=EvalSpec(
            eval_id=key,
            run_id=key,
            task_id=key,
            created=started or "1970-01-01T00:00:00+00:00",
            task=f"icm/{run.testbed}",
            task_args={name: value for name, value in run.settings.items() if value is not None},
            solver=run.search,
            dataset=EvalDataset(
                name=run.testbed,
                samples=len(samples),
                sample_ids=[sample.id for sample in samples],
                shuffled=False,
            ),
            model=run.model,
            config=EvalConfig(epochs=1),
            packages={name: str(version) for name, version in (run.environment.get("packages") or {}).items()},
            metadata={name: value for name, value in known.items() if name not in ("settings", "model")},
        ),
        plan=EvalPlan(name=run.search),
        results=EvalResults(
            total_samples=len(samples), completed_samples=len(samples), scores=[_score_of_all(run, claims)]
        ),
        stats=EvalStats(started_at=started, completed_at=finished, model_usage={run.model: _usage(run)}),
        samples=samples,
    )


def _samples(run: RunRecord, claims: Sequence[LabelledClaim]) -> Iterator[EvalSample]:
    testbed = run.asked_by
    rows = [claim.row for claim in claims]
    by_row = len(set(rows)) == len(rows)
    started, finished = _utc(run.started) or None, _utc(run.finished) or None
    for at, claim in enumerate(claims):
        question = testbed.text(claim.fields)
        answer = "" if claim.label is None or claim.abstained else run.names[claim.label]
        yield EvalSample(
            id=claim.row if by_row else at,
            epoch=1,
            input=question,
            choices=list(run.names),
            target="" if claim.gold is None else run.names[claim.gold],
            messages=[ChatMessageUser(content=question), ChatMessageAssistant(content=answer, model=run.model)],
            output=ModelOutput.from_content(run.model, answer),
            scores={SCORER: _score(run, claim, answer)},
            metadata=_told(run, claim),
            started_at=started,
            completed_at=finished,
        )


def _score(run: RunRecord, claim: LabelledClaim, answer: str) -> Score:
    agrees = None if claim.abstained else claim.agrees
    margins = run.margins(claim)
    sure = None if margins is None or claim.label is None else margins[claim.label]
    return Score(
        value=NOANSWER if agrees is None else CORRECT if agrees else INCORRECT,
        answer=answer or None,
        explanation=None if sure is None else f"margin of the label {sure:+.2f} nat",
        metadata={
            "margin": sure,
            "probability": None if sure is None else probability(sure),
            "by": claim.by,
            "abstained": claim.abstained,
        },
    )


def _told(run: RunRecord, claim: LabelledClaim) -> dict[str, Any]:
    odds = written_odds(claim.log_odds, run.names)
    without = {} if claim.zero_shot is None else written_odds(claim.zero_shot, run.names, "zero_shot")
    return {**claim.fields, "consistency_id": claim.group, "row": claim.row, **odds, **without}


def _score_of_all(run: RunRecord, claims: Sequence[LabelledClaim]) -> EvalScore:
    """Agreement with gold of the claims that are compared, and its standard error."""
    agreeing = [bool(claim.agrees) for claim in claims if claim.agrees is not None and not claim.abstained]
    count = len(agreeing)
    metrics = {}
    if count:
        share = sum(agreeing) / count
        error = math.sqrt(share * (1 - share) / (count - 1)) if count > 1 else 0.0
        metrics = {name: EvalMetric(name=name, value=value) for name, value in (("accuracy", share), ("stderr", error))}
    return EvalScore(
        name=SCORER,
        scorer=SCORER,
        scored_samples=count,
        unscored_samples=len(claims) - count,
        metrics=metrics,
        metadata={"U": None if run.result is None else run.result.get("U")},
    )


def _usage(run: RunRecord) -> ModelUsage:
    sent, cached = (int(run.cost.get(name, 0)) for name in ("tokens_sent", "tokens_cached"))
    return ModelUsage(input_tokens=max(0, sent - cached), input_tokens_cache_read=cached, total_tokens=sent)


def _utc(moment: str | None) -> str:
    """The time as inspect_ai wants it, with a colon in its zone; "" where it is not known."""
    try:
        return "" if moment is None else datetime.strptime(moment, "%Y-%m-%dT%H:%M:%S%z").isoformat()
    except ValueError:
        return ""
