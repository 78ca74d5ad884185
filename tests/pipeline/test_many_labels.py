"""Whole runs of three and four labels on a fake server: what they ask, write, resume and report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import orjson
import pytest

from core.llm_api.engines.vllm import VLLMClient
from core.llm_api.labels import LabelSpace
from core.llm_api.llm import ModelAPI
from fakes.vllm_server import FakeVLLM, encode, hashed_log_odds
from src.experiments.summary import print_summary
from src.experiments.watch import Watch
from src.icm import testbeds
from src.icm.annealing import SearchState
from src.icm.consistency import Relation
from src.icm.journal import replay
from src.icm.objective import Objective
from src.icm.problem import SearchSettings
from src.icm.searches.seam import Record
from src.icm.speculation import Pace
from src.icm.testbeds import BadInput, Claim, custom_testbed
from src.pipeline.baselines import run_baseline
from src.pipeline.baselines.trial import Options, Trial
from src.pipeline.continuing import read_continued
from src.pipeline.labelling import Labelling, Pool, prepare_batches, result_record
from src.pipeline.search import search
from src.results.diagnosis import diagnose
from src.results.exports import plain_rows, preference_pairs, training_rows
from src.results.messages import check_table
from src.results.page import render_report
from src.results.plots import plot_curves
from src.results.rows import pool_rows
from src.results.run_folder import RunFolder
from src.results.run_reader import read_run
from src.results.side_by_side import as_text, compare
from src.results.tables import confusion_of

MOODS = LabelSpace(("negative", "neutral", "positive"), (" negative", " neutral", " positive"))
LETTERS = LabelSpace(("A", "B", "C", "D"), (" A", " B", " C", " D"))
SPACES = pytest.mark.parametrize("space", [MOODS, LETTERS], ids=["three", "four"])
COST = {"asked", "from_cache", "tokens_sent", "tokens_cached", "tokens_computed", "floored", "seconds"}
COST |= {"asked_ahead", "ahead_used"}


def right_label(text: str, space: LabelSpace) -> int:
    return sum(encode(text)[-6:]) % len(space)


@dataclass
class Model:
    """Leans to the right label of a claim by its last words, against a lean that all claims share, and somewhat by
    all that stands before."""

    space: LabelSpace
    certainty: float = 3.0

    def __call__(self, tokens: Sequence[int]) -> dict[int, float]:
        right = sum(tokens[-6:]) % len(self.space)
        logits = [
            self.certainty * (label == right) + 0.7 * label + 0.1 * hashed_log_odds([label, *tokens])
            for label in range(len(self.space))
        ]
        whole = math.log(sum(map(math.exp, logits)) / 0.9)
        return {encode(text)[0]: z - whole for text, z in zip(self.space.texts, logits, strict=True)}


def claims_of(space: LabelSpace, count: int = 24, *, pairs: bool = True) -> tuple[testbeds.Testbed, list[Claim]]:
    """Claims of which each two are of one group; the two have the same label wherever `pairs`."""
    testbed = replace(
        custom_testbed({}), name="moods", template="Text: {question} {choice}\nIt is", space=space, gold_free=alike
    )
    claims: list[Claim] = []
    number = 0
    while len(claims) < count:
        question, number = f"thing {number}", number + 1
        found = [testbed.claim({"question": question, "choice": f"seen {side}"}, len(claims)) for side in range(40)]
        gold = [right_label(claim.text, space) for claim in found]
        second = next((at for at in range(1, 40) if gold[at] == gold[0]), None) if pairs else 1
        if second is not None:
            for at in (0, second):
                row = len(claims)
                claims.append(replace(found[at], row=row, of_row=row, gold=gold[at], group=question))
    return testbed, claims


def alike(first: Claim, second: Claim) -> Relation | None:
    return Relation.AGREE if first.gold == second.gold else Relation.DIFFERENT


def pool_of(space: LabelSpace, *, pairs: bool = True, size: int = 18, calibrate: Any = "mean", **settings: Any) -> Pool:
    testbed, claims = claims_of(space, pairs=pairs)
    [pool] = prepare_batches(
        testbed,
        claims,
        Path(__file__),
        batch_size=size,
        consistency="gold-free",
        objective=Objective(30.0, calibrate),
        settings=SearchSettings(**{"seed": 3, "num_seed": 6, "patience": 12, "K": 120, "max_tail": 6} | settings),
    )
    return pool


class Stopped(Exception):
    pass


async def run(
    pool: Pool, folder: Path, *, ahead: int = 0, stop_after: int | None = None, model: Model | None = None
) -> tuple[Labelling, SearchState, list[Record], FakeVLLM]:
    """A search, and its files as a run keeps them."""
    records: list[Record] = []

    def on_record(state: SearchState, record: Record) -> None:
        records.append(record)
        if len(records) == stop_after:
            raise Stopped

    async with FakeVLLM(distribution=model or Model(pool.testbed.space)) as server:
        async with ModelAPI(VLLMClient(server.url, server.model)) as api:
            labelling = (await Labelling.open(pool, api)).planned_for(4_000)
            with RunFolder(folder) as kept:
                settings = {
                    "testbed": "moods",
                    "model": server.model,
                    "alpha": 30.0,
                    "calibrate": "mean",
                    "labels": list(pool.testbed.space.names),
                    "label_texts": list(pool.testbed.space.texts),
                }
                begun = {"settings": settings, "engine": {"model": server.model}, "testbed": pool.testbed.record()}
                kept.write_run(begun)
                kept.write_claims(pool_rows(pool.claims, pool.problem.consistency, pool.names))
                state = await search(api, labelling.scorer(), kept, on_record, Pace(ahead))
                zero_shot = await labelling.zero_shot()
                predictions = {"many-shot": await labelling.label_rest(state)}
                if None in state.labels:
                    predictions["predicted"] = await labelling.predict_unlabelled(state)
                kept.write_labels(labelling.label_rows(state, predictions, zero_shot))
                result = result_record(labelling, state, zero_shot, predictions)
                cost = {"seconds": 1.0, "tokens_computed": 10.0, "tokens_cached": 10.0, "floored": 0}
                more = {"result": {**result, "warning": None}, "cost": cost, "finished": "now", "left_out": 0}
                kept.write_run(begun | more)
                return labelling, state, kept.read_log(), server


def decisions(records: Sequence[Record]) -> list[Record]:
    return [{key: value for key, value in record.items() if key not in COST} for record in records]


@SPACES
async def test_a_search_finds_labels_that_zero_shot_does_not(space: LabelSpace, tmp_path: Path) -> None:
    labelling, state, records, server = await run(pool_of(space), tmp_path / "run", model=Model(space, 1.6))
    zero_shot = read_run(tmp_path / "run").result
    assert zero_shot is not None
    agreeing, compared = zero_shot["icm"]
    assert compared >= 14
    assert agreeing > zero_shot["zero_shot"][0]
    assert agreeing >= compared - 2
    assert labelling.pool.problem.consistency.count(state.labels) == 0
    asked = [body["logprob_token_ids"] for body in server.pools]
    assert {tuple(ids) for ids in asked} == {tuple(encode(text)[0] for text in reversed(space.texts))}
    replayed = replay(labelling.pool.problem, records)
    assert replayed is not None
    assert replayed.labels == state.labels


VARIANTS: dict[str, dict[str, Any]] = {
    "tree": {"calibrate": "none"},
    "upstream": {"layout": "upstream"},
    "context_cap": {"context_cap": 6},
    "best_of": {"best_of": 3},
    "local_gain": {"local_gain": True},
    "cold": {"initial_T": 0.1, "num_seed": 3},
    "different": {"pairs": False},
}


@pytest.mark.parametrize("variant", VARIANTS)
async def test_a_stopped_search_goes_on_as_if_it_had_not_and_looking_ahead_decides_nothing(
    variant: str, tmp_path: Path
) -> None:
    pool = pool_of(MOODS, **VARIANTS[variant])
    _, state, records, _ = await run(pool, tmp_path / "whole")
    assert {"start", "step", "mirror"} <= {record["event"] for record in records}
    for stop in (1, 4, len(records) - 1):
        with pytest.raises(Stopped):
            await run(pool, tmp_path / f"stopped-{stop}", stop_after=stop)
        _, again, more, _ = await run(pool, tmp_path / f"stopped-{stop}")
        assert again.labels == state.labels
        assert decisions(more) == decisions(records)
    if variant != "best_of":  # which asks nothing ahead
        _, ahead, others, _ = await run(pool, tmp_path / "ahead", ahead=4)
        assert ahead.labels == state.labels
        assert decisions(others) == decisions(records)
        assert sum(record["ahead_used"] for record in others) > 0


async def test_files_name_the_labels(tmp_path: Path) -> None:
    pool = pool_of(MOODS)
    labelling, state, records, _ = await run(pool, tmp_path / "run")
    rows = [orjson.loads(line) for line in (tmp_path / "run/labels.jsonl").read_bytes().splitlines()]
    for row in rows:
        assert row["label"] in MOODS.names
        assert row["gold"] in MOODS.names
        assert tuple(row["logprobs"]) == MOODS.names
        assert row["by"] == "many-shot" or tuple(row["zero_shot"]) == MOODS.names
        assert math.fsum(map(math.exp, row["logprobs"].values())) == pytest.approx(1)
        assert "log_odds" not in row
    journal = [orjson.loads(line) for line in (tmp_path / "run/log.jsonl").read_bytes().splitlines()]
    assert (journal[0]["format"], journal[0]["num_labels"]) == (3, 3)
    steps = [record for record in journal if record["event"] == "step"]
    assert all(len(step["log_odds"]) == 2 and sum(step["label_counts"]) == step["labelled"] for step in steps)
    assert "true_labels" not in steps[0]
    found = read_run(tmp_path / "run")
    assert found.skipped == 0
    assert len(found.journal) == len(records)
    assert [claim.label if claim.searched else None for claim in found.pool] == list(state.labels)
    for position, log_odds in state.evaluation.log_odds.items():
        assert found.pool[position].log_odds == pytest.approx(log_odds)
    counts = {name: state.labels.count(label) for label, name in enumerate(MOODS.names)}
    assert (found.result or {})["label_counts"] == counts
    (tmp_path / "run/labels.jsonl").unlink()
    unfinished = read_run(tmp_path / "run")
    assert [claim.label for claim in unfinished.pool] == list(state.labels)
    assert [claim.gold for claim in unfinished.pool] == labelling.pool.gold


async def test_two_labels_of_other_names_are_true_and_false_to_the_search_alone(tmp_path: Path) -> None:
    space = LabelSpace(("no", "yes"), (" no", " yes"))
    pool = pool_of(space)
    _, state, records, _ = await run(pool, tmp_path / "run")
    assert set(state.labels) <= {True, False, None}
    assert all(isinstance(label, bool | None) for label in state.labels)
    assert "format" not in records[0]
    assert {type(value) for value in records[0]["scores"].values()} == {float}
    assert records[-2]["true_labels"] == state.labels.count(True)
    found = read_run(tmp_path / "run")
    assert [claim.label if claim.searched else None for claim in found.pool] == list(state.labels)
    for position, log_odds in state.evaluation.log_odds.items():
        assert found.pool[position].log_odds == pytest.approx(log_odds)
    assert {row["label"] for row in plain_rows(found, found.claims)} == {"no", "yes"}
    assert (found.result or {})["label_counts"] == {"no": state.labels.count(False), "yes": state.labels.count(True)}
    page = render_report([], [found])
    assert "labelled yes" in page
    assert "True" not in page.partition("<main")[2]


async def test_reports_count_by_label_and_show_the_confusion(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pool = pool_of(MOODS)
    _, state, records, _ = await run(pool, tmp_path / "run")
    found = read_run(tmp_path / "run")
    table = confusion_of(found)
    assert table is not None
    assert sum(map(sum, table.table)) == len(state.labelled)
    assert sum(table.table[k][k] for k in range(3)) == sum(a == b for a, b in zip(state.labels, pool.gold, strict=True))
    page = render_report([], [found])
    for name in MOODS.names:
        assert f">{name}</option>" in page
        assert f'<th scope="row">{name}</th>' in page
    counts = ", ".join(f"{state.labels.count(label)} {name}" for label, name in enumerate(MOODS.names))
    assert counts in page
    findings = {finding.key: finding for finding in diagnose(found)}
    assert "labels are" in findings["collapse"].text
    assert "swap" in findings["inverted"].text
    assert "AUC" not in findings["salience"].text
    print_summary(RunFolder(tmp_path / "run"), orjson.loads((tmp_path / "run/run.json").read_bytes()))
    said = capsys.readouterr().out
    assert counts in said
    table_lines = said.partition("by gold label:\n")[2].splitlines()[:4]
    assert [line.split()[0] for line in table_lines] == ["gold", *MOODS.names]
    watch = Watch(tmp_path / "run")
    assert watch.poll()
    assert any("the commonest label; iteration" in line for line in watch.lines(True))
    plot_curves(records, pool.gold, tmp_path / "curves.png", "title")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "kappa" in as_text(compare([found, found]))


async def test_labels_swapped_for_each_other_are_told(tmp_path: Path) -> None:
    await run(pool_of(MOODS), tmp_path / "run")
    found = read_run(tmp_path / "run")
    turned = {0: 2, 1: 1, 2: 0}
    wrong = tuple(replace(c, label=None if c.label is None else turned[c.label]) for c in found.claims)
    [finding] = [each for each in diagnose(replace(found, claims=wrong)) if each.key == "inverted"]
    assert finding.verdict == "problem"
    assert "with negative and positive swapped" in finding.text


async def test_exports_name_the_labels(tmp_path: Path) -> None:
    await run(pool_of(MOODS), tmp_path / "run")
    found = read_run(tmp_path / "run")
    [first, *_] = plain_rows(found, found.claims)
    assert first["label"] in MOODS.names
    assert {"logprob_negative", "logprob_neutral", "logprob_positive", "zero_shot_positive"} <= set(first)
    assert "log_odds" not in first
    assert 0 < first["probability"] <= 1
    completions = {row["completion"] for row in training_rows(found, found.claims)}
    assert completions == set(MOODS.texts)
    with pytest.raises(BadInput, match="preference pairs are made of True and False"):
        preference_pairs(found, found.claims)


async def test_a_run_goes_on_from_labels_of_the_same_names_only(tmp_path: Path) -> None:
    await run(pool_of(MOODS), tmp_path / "before")
    testbed, claims = claims_of(MOODS)
    continued = read_continued("before", tmp_path, testbed, claims, Path("new.jsonl"))
    counts = continued.summary()["label_counts"]
    assert sum(counts.values()) == len([claim for claim in read_run(tmp_path / "before").pool if claim.searched])
    assert f"{counts['neutral']} neutral" in continued.notes(file="new.jsonl", model="m", pool=18, outside=0)[0]
    with pytest.raises(BadInput, match=r"its labels are ' negative' .* those of new\.jsonl are ' A'"):
        read_continued("before", tmp_path, replace(testbed, space=LETTERS), claims, Path("new.jsonl"))


async def test_baselines_have_rows_of_every_label(tmp_path: Path) -> None:
    pool = pool_of(MOODS)
    async with FakeVLLM(distribution=Model(MOODS)) as server:
        async with ModelAPI(VLLMClient(server.url, server.model)) as api:
            labelling = await Labelling.open(pool, api)
            trial, options = Trial("zero-shot-calibrated", labelling), Options(rounds=2, start="zero-shot")
            rows = [
                await run_baseline(trial),
                await run_baseline(replace(trial, row="many-shot-gold")),
                await run_baseline(replace(trial, row="many-shot-flipped")),
                await run_baseline(replace(trial, row="bootstrap-consistent", options=options)),
            ]
            table = check_table(await labelling.check(), "mean")
    assert sorted(trial.random_labels()) == [0] * 6 + [1] * 6 + [2] * 6
    for row in rows:
        assert {answer.label for answer in row.pool} == {0, 1, 2}
        assert sum(answer.label == answer.gold for answer in row.pool) >= 15
    consistent = [answer.label for answer in sorted(rows[-1].pool, key=lambda answer: answer.claim)]
    by_group = {answer.group: answer.label for answer in rows[-1].pool}
    assert all(by_group[answer.group] == answer.label for answer in rows[-1].pool)
    assert len(consistent) == 18
    for name in ("gold", "all negative", "all positive", "gold, negative and neutral swapped", "random"):
        assert f"\n{name} " in table
    assert "U(gold) is the highest" in table


def test_what_only_true_and_false_can_have_is_refused_in_one_line(tmp_path: Path) -> None:
    testbed, claims = claims_of(MOODS)
    settings = {
        "batch_size": 18, "consistency": "gold-free", "objective": Objective(30.0), "settings": SearchSettings()
    }  # fmt: skip
    path = tmp_path / "claims"
    path.touch()
    with pytest.raises(BadInput, match=r"^--prior is the share of one of two labels, and \S* has 3: negative, neutral"):
        prepare_batches(testbed, claims, path, **settings | {"objective": Objective(30.0, "mean", 0.8)})
    one = replace(testbed, gold_free=lambda first, second: Relation.EXACTLY_ONE)
    with pytest.raises(BadInput, match=r"^\S*: has claims of which exactly one is true, and 3 labels") as refusal:
        prepare_batches(one, claims, path, **settings)
    assert "\n" not in str(refusal.value)
