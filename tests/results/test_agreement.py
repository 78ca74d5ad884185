"""Agreement and kappa, and which runs and claims are compared."""

from __future__ import annotations

from dataclasses import replace

from src.results.agreement import agreement_of, cohens_kappa, differing_settings, paired_test, votes
from src.results.run_record import LabelledClaim, RunRecord


def run(name: str, labels: dict[int, bool], gold: dict[int, bool] | None = None, **settings: object) -> RunRecord:
    claims = tuple(
        LabelledClaim(row, "g", "q", "c", label=label, gold=(gold or {}).get(row)) for row, label in labels.items()
    )
    return RunRecord(name, {"data_sha256": "x", **settings}, claims)


def test_kappa_of_the_same_mirrored_and_unrelated_labels() -> None:
    same = [(True, True), (False, False)] * 5
    assert cohens_kappa(same) == 1.0
    assert cohens_kappa([(a, not b) for a, b in same]) == -1.0
    assert cohens_kappa([(a, b) for a in (True, False) for b in (True, False)]) == 0.0
    assert cohens_kappa([(True, True)]) is None
    assert cohens_kappa([]) is None


def test_runs_that_never_differ_have_no_p() -> None:
    gold = {0: True, 1: True}
    test = paired_test(run("a", {0: True, 1: False}, gold), run("b", {0: True, 1: False}, gold))
    assert (test.only_first, test.only_second, test.compared, test.p) == (0, 0, 2, None)


def test_only_shared_claims_are_compared() -> None:
    gold = {0: True, 1: True, 2: False}
    first, second = run("a", {0: True, 1: True, 2: False, 3: True}, gold), run("b", {0: True, 1: False, 2: True}, gold)
    found = agreement_of(first, second)
    assert (found.agreeing, found.compared) == (1, 3)
    test = paired_test(first, second)
    assert (test.only_first, test.only_second, test.compared, test.p) == (2, 0, 3, 0.5)
    assert set(votes([first, second])) == {("x", 0), ("x", 1), ("x", 2)}


def test_runs_of_other_data_share_no_claim() -> None:
    other = RunRecord("b", {"data_sha256": "y"}, run("b", {0: True}).claims)
    assert agreement_of(run("a", {0: True}), other).compared == 0


def test_settings_that_differ() -> None:
    table = differing_settings([run("a", {}, alpha=50, seed=1), run("b", {}, alpha=50, seed=2, anchors=4)])
    assert table == {"seed": [1, 2], "anchors": [None, 4]}


def test_labels_that_were_known_are_not_compared() -> None:
    gold = {0: True, 1: True, 2: True}
    first, second = run("a", {0: True, 1: True, 2: False}, gold), run("b", {0: True, 1: False, 2: True}, gold)
    known = [replace(one, claims=(replace(one.claims[0], by="known"), *one.claims[1:])) for one in (first, second)]
    assert agreement_of(first, second).compared == 3
    assert agreement_of(*known).compared == 2
    assert agreement_of(first, known[1]).compared == 3
    assert paired_test(first, known[1]).compared == 2
    assert [claim.agrees for claim in known[1].claims] == [None, False, True]
    assert known[1].gold == [None, True, True]
