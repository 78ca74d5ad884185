"""Each failure is seen where it is, and not where it is not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from src.icm.consistency import Constraint, Relation
from src.results.diagnosis import collapse, diagnose, frozen, inconsistency, inversion, salience
from src.results.findings import Verdict
from src.results.flips import flips
from src.results.run_reader import read_run
from src.results.run_record import RunRecord
from tests.run_examples import write_run

HALF = [n % 2 == 0 for n in range(40)]
OPPOSITE = [not label for label in HALF]
ALONE = [1.0 + 0.01 * n if label else -1.0 - 0.01 * n for n, label in enumerate(HALF)]


def example(tmp_path: Path, name: str = "run", **changes: Any) -> RunRecord:
    return read_run(write_run(tmp_path / name, **({"labels": HALF, "gold": HALF, "zero_shot": ALONE} | changes)))


def test_a_good_run_has_no_problem(tmp_path: Path) -> None:
    run = example(tmp_path, mirror=10.0, constraints={0: [(1, "exactly one is true")]})
    assert {finding.verdict for finding in diagnose(run)} == {Verdict.OK}
    assert all(not finding.advice for finding in diagnose(run))


def test_collapse(tmp_path: Path) -> None:
    finding = collapse(example(tmp_path, labels=[True] * 40))
    assert finding.verdict is Verdict.PROBLEM
    assert "40 of 40 labels are True" in finding.text
    assert any("--calibrate mean" in advice.text for advice in finding.advice)
    assert all(source.arxiv for advice in finding.advice for source in advice.sources)


def test_labels_as_lopsided_as_the_truth_are_no_collapse(tmp_path: Path) -> None:
    assert collapse(example(tmp_path, labels=[True] * 40, gold=[True] * 40)).verdict is Verdict.WATCH


def test_labels_as_lopsided_as_they_were_said_to_be_are_no_collapse(tmp_path: Path) -> None:
    labels = [n > 0 for n in range(40)]
    run = example(tmp_path, labels=labels, gold=HALF)
    assert collapse(run).verdict is Verdict.PROBLEM
    known = replace(run, settings={**run.settings, "calibrate": "mean", "prior": 0.97})
    assert collapse(known).verdict is Verdict.OK
    assert "expect 97% True" in collapse(known).text
    other = replace(run, settings={**run.settings, "calibrate": "mean", "prior": 0.8})
    assert collapse(other).verdict is Verdict.PROBLEM  # 8 of 40 should be False, not 1


def test_few_labels_tell_nothing(tmp_path: Path) -> None:
    run = example(tmp_path, labels=HALF[:8], gold=HALF[:8], zero_shot=ALONE[:8])
    assert {f.key: f.verdict for f in diagnose(run)} == {
        "collapse": Verdict.UNKNOWN,
        "frozen": Verdict.UNKNOWN,
        "inconsistent": Verdict.OK,
        "salience": Verdict.UNKNOWN,
        "inverted": Verdict.UNKNOWN,
    }


def test_a_frozen_start(tmp_path: Path) -> None:
    # 10 of 40 claims in the pool were taken in, then 60 proposals changed nothing.
    write_run(tmp_path / "run", labels=HALF[:10], gold=HALF[:10], seeds=8, refused=60, finished=False)
    write_run(tmp_path / "whole", labels=HALF, gold=HALF, finished=False)
    (tmp_path / "run" / "claims.jsonl").write_bytes((tmp_path / "whole" / "claims.jsonl").read_bytes())
    finding = frozen(read_run(tmp_path / "run"))
    assert finding.verdict is Verdict.PROBLEM
    assert "10 of 40 claims were taken in; the last change was iteration 1 of 62" in finding.text
    assert "8 of 8 labels of the random start were kept" in finding.text
    assert any("-3.00" in line for line in finding.details)


@pytest.mark.parametrize(
    ("wrong", "told"), [(1, "1 wrong label of the random start was"), (2, "2 wrong labels of the random start were")]
)
def test_wrong_labels_of_the_start_are_counted(tmp_path: Path, wrong: int, told: str) -> None:
    gold = [not label for label in HALF[:wrong]] + HALF[wrong:]
    assert any(line.startswith(f"{told} never corrected") for line in frozen(example(tmp_path, gold=gold)).details)


def test_groups_that_stay_inconsistent(tmp_path: Path) -> None:
    both = {0: [(1, "exactly one is true")], 2: [(3, "at most one is true")]}
    labels = [True, True, True, False, *HALF[4:]]
    finding = inconsistency(example(tmp_path, labels=labels, constraints=both))
    assert finding.verdict is Verdict.PROBLEM
    assert "1 of 2 constraints is broken, in 1 group." in finding.text
    assert "rows 0 (True) and 1 (True)" in finding.details[0]


def test_a_set_of_claims_that_are_all_false_is_told_whole(tmp_path: Path) -> None:
    run = example(tmp_path, labels=[False, False, False, *HALF[3:]])
    finding = inconsistency(replace(run, constraints=(Constraint((0, 1, 2), Relation.EXACTLY_ONE),)))
    assert finding.text == "1 of 1 constraint is broken, in 1 group."
    assert "rows 0 (False), 1 (False) and 2 (False), of which exactly one is True." in finding.details[0]


def test_an_older_run_has_only_a_count(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", labels=HALF, gold=HALF)
    (folder / "claims.jsonl").unlink()
    assert inconsistency(read_run(folder)).verdict is Verdict.OK


def test_labels_that_nothing_predicts_are_not_salient(tmp_path: Path) -> None:
    faint = [0.1 if label else -0.1 for label in HALF]
    assert salience(example(tmp_path, log_odds=faint)).verdict is Verdict.PROBLEM


def test_labels_that_the_model_alone_does_not_rank_deserve_a_look(tmp_path: Path) -> None:
    unrelated = [float(n % 5) for n in range(40)]
    finding = salience(example(tmp_path, zero_shot=unrelated))
    assert finding.verdict is Verdict.WATCH
    assert any("2312.10029" in source.arxiv for advice in finding.advice for source in advice.sources)


def test_an_offset_of_all_answers_is_no_lack_of_salience(tmp_path: Path) -> None:
    leaning = [value + 10.0 for value in ALONE]
    assert salience(example(tmp_path, zero_shot=leaning)).verdict is Verdict.OK


def test_no_zero_shot_no_contrast(tmp_path: Path) -> None:
    assert salience(example(tmp_path, zero_shot=None)).verdict is Verdict.UNKNOWN


def test_inverted_labels_by_gold_and_without(tmp_path: Path) -> None:
    by_gold = inversion(example(tmp_path, "gold", labels=OPPOSITE))
    assert by_gold.verdict is Verdict.PROBLEM
    without = inversion(example(tmp_path, "none", labels=OPPOSITE, gold=[None] * 40))
    assert without.verdict is Verdict.WATCH
    assert any("--mirror" in advice.text for advice in without.advice)


@pytest.mark.parametrize(("mirror", "verdict"), [(10.0, Verdict.OK), (45.0, Verdict.WATCH)])
def test_a_mirror_nearly_as_good_deserves_a_look(tmp_path: Path, mirror: float, verdict: Verdict) -> None:
    run = example(tmp_path, gold=[None] * 40, zero_shot=None, mirror=mirror)
    assert inversion(run).verdict is verdict


def test_labels_that_flip_between_runs(tmp_path: Path) -> None:
    a, b = example(tmp_path, "a"), example(tmp_path, "b", labels=[not HALF[0], not HALF[1], *HALF[2:]])
    same, some, all_of_them = flips([a, a]), flips([a, b]), flips([a, example(tmp_path, "c", labels=OPPOSITE)])
    assert (same.verdict, some.verdict, all_of_them.verdict) == (Verdict.OK, Verdict.WATCH, Verdict.PROBLEM)
    assert "2 of 40 claims" in some.text
    assert any("row 0" in line for line in some.details)
    assert "mirror images" in all_of_them.details[0]


def test_runs_of_other_data_cannot_be_held_against_each_other(tmp_path: Path) -> None:
    a, b = example(tmp_path, "a"), example(tmp_path, "b", data="e" * 64)
    assert flips([a, b]).verdict is Verdict.UNKNOWN


def test_known_labels_tell_inverted_labels_apart(tmp_path: Path) -> None:
    run = example(tmp_path, gold=None)

    def with_known(turned: bool) -> RunRecord:
        claims = [
            replace(claim, by="known", label=bool(claim.label) != turned) if at < 10 else claim
            for at, claim in enumerate(run.claims)
        ]
        return replace(run, claims=tuple(claims))

    as_found, against = inversion(with_known(False)), inversion(with_known(True))
    assert "10 of 10 known labels are what the model predicts from the others." in as_found.text
    assert "0 of 10 known labels are what the model predicts from the others." in against.text
    assert (as_found.verdict, against.verdict) == (Verdict.OK, Verdict.WATCH)
    assert "known labels" not in inversion(run).text
