"""What a run gives to a file that grew or was edited: which claims are the same, which pool they make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest

from src.icm import testbeds
from src.icm.problem import Stream, generator
from src.icm.testbeds import TESTBEDS, BadInput, Claim, custom_testbed
from src.pipeline.continuing import Continued, read_continued

DATA = custom_testbed({})
FILE = Path("grown.jsonl")


def row(text: str, group: str | int | None = None, **more: Any) -> dict[str, Any]:
    return {"question": f"About {text}", "choice": text, "consistency_id": group, **more}


def claims_of(*rows: dict[str, Any], testbed: testbeds.Testbed = DATA) -> list[Claim]:
    return [testbed.claim(fields, at) for at, fields in enumerate(rows)]


def write_run(
    runs: Path,
    claims: Sequence[Claim],
    labels: Sequence[bool | None],
    *,
    finished: bool = True,
    testbed: str = "old.jsonl",
    by: str = "icm",
    **more: Any,
) -> None:
    """A run's folder as RunFolder leaves it, of a search that is finished or was stopped."""
    folder = runs / "before"
    folder.mkdir(parents=True, exist_ok=True)
    document: dict[str, Any] = {"format": 2, "settings": {"testbed": testbed, "model": "m"}, "engine": {"model": "m"}}
    (folder / "run.json").write_bytes(orjson.dumps(document | ({"result": {}} if finished else {}) | more))
    rows = [
        {"row": c.row, "consistency_id": c.group, "question": c.question, "choice": c.choice, "choice_2": c.choice_2}
        for c in claims
    ]
    (folder / "claims.jsonl").write_bytes(b"".join(orjson.dumps(each) + b"\n" for each in rows))
    told = {str(at): label for at, label in enumerate(labels) if label is not None}
    journal: list[dict[str, Any]] = [{"event": "start", "labels": {}, "scores": {}, "U": 0.0}]
    if told:
        step = {"iteration": 0, "claim": 0, "accepted": True, "changes": told, "scores": {}, "U": 1.0}
        journal.append({"event": "step", **step})
    (folder / "log.jsonl").write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in journal))
    if finished:
        labelled = [
            each | {"label": label, "log_odds": 1.0, "by": by} for each, label in zip(rows, labels, strict=True)
        ]
        (folder / "labels.jsonl").write_bytes(b"".join(orjson.dumps(each) + b"\n" for each in labelled))


def continued(runs: Path, claims: Sequence[Claim], testbed: testbeds.Testbed = DATA) -> Continued:
    return read_continued("before", runs, testbed, claims, FILE)


def pool(start: Continued, claims: Sequence[Claim], batch_size: int) -> list[int]:
    return start.pool(claims, batch_size, generator(1, Stream.POOL))


@pytest.mark.parametrize("finished", [True, False])
def test_labels_follow_the_text_of_their_claims(tmp_path: Path, finished: bool) -> None:
    before = claims_of(row("a", 1), row("b", 1), row("c", 2))
    write_run(tmp_path, [before[2], before[0], before[1]], [True, False, None], finished=finished)
    now = claims_of(row("new", 3), row("a", 1), row("b", 1), row("new sibling", 2), row("c", 2))
    start = continued(tmp_path, now)
    assert start.labels == {4: True, 1: False, 2: None}
    assert (start.gone, start.regrouped, start.model) == ((), 0, "m")
    # Its claims first, in its order; then what is new in their groups, then what has room.
    places = pool(start, now, 256)
    assert places == [4, 1, 2, 3, 0]
    assert start.start_labels(places) == (True, False, None, None, None)
    # As versions did that kept no order: whole groups.
    assert pool(replace(start, as_before=True), now, 256) == [3, 4, 1, 2, 0]


def test_its_claims_are_in_the_pool_whatever_the_batch_size_is_and_new_groups_stay_whole(tmp_path: Path) -> None:
    before = claims_of(*(row(str(n), n // 2) for n in range(6)))
    write_run(tmp_path, before, [True] * 6)
    now = claims_of(*(row(str(n), n // 2) for n in range(14)))
    start = continued(tmp_path, now)
    assert pool(start, now, 2) == pool(start, now, 7) == list(range(6))
    places = pool(start, now, 11)
    assert places[:6] == list(range(6))
    assert len(places) == 10
    assert [place // 2 for place in places[6::2]] == [place // 2 for place in places[7::2]]
    assert sorted(pool(start, now, 14)) == list(range(14))


def test_what_is_gone_and_what_moved_to_another_group_is_counted_and_named(tmp_path: Path) -> None:
    before = claims_of(*(row(f"claim {n}", n) for n in range(8)))
    write_run(tmp_path, before, [n % 2 == 0 for n in range(8)])
    now = claims_of(*(row(f"claim {n}", n) for n in range(2)), row("claim 2", "other"), row("claim 3, edited", 3))
    start = continued(tmp_path, now)
    assert start.labels == {0: True, 1: False, 2: True}
    assert [claim.row for claim in start.gone] == [3, 4, 5, 6, 7]
    lines = start.notes(file="grown.jsonl", model="another", pool=4, outside=5)
    assert lines == [
        "starts with 3 labels of before (2 True) in place of random ones; "
        "1 new claim of grown.jsonl in the pool with them",
        "5 claims of before not in grown.jsonl, removed or edited: row 3 ('About claim 3 / claim 3'), "
        "row 4 ('About claim 4 / claim 4'), row 5 ('About claim 5 / claim 5'), and 2 more",
        "1 claim of before in another group (consistency_id) in grown.jsonl",
        "the labels of before were found with m; from here on another is asked",
        "no room for 5 claims of grown.jsonl: --batch_size 9 takes in all",
    ]
    told = start.notes(file="f", model="m", pool=4, outside=0, batch_size=2, listed="runs/new/gone.jsonl")
    assert told[1].endswith("and 2 more (all in runs/new/gone.jsonl)")
    assert "the pool has 4 claims, those of before and their groups, whatever --batch_size 2" in told
    assert not any("batch_size" in line for line in start.notes(file="f", model="m", pool=4, outside=0, batch_size=4))
    assert start.summary() == {
        "run": "before", "model": "m", "labels": 3, "true_labels": 2, "gone": 5, "regrouped": 1
    }  # fmt: skip


def test_equal_texts_keep_the_labels_of_their_groups_and_else_their_order(tmp_path: Path) -> None:
    before = claims_of(row("same", 1), row("same", 2), row("same", 3))
    write_run(tmp_path, before, [True, False, True])
    now = claims_of(row("same", 9), row("same", 2), row("same", 1), row("same", 8))
    start = continued(tmp_path, now)
    assert start.labels == {2: True, 1: False, 0: True}
    assert start.regrouped == 1


def test_a_claim_without_a_consistency_id_is_itself_in_another_row(tmp_path: Path) -> None:
    write_run(tmp_path, claims_of(row("a"), row("b")), [True, False])
    now = claims_of(row("new"), row("a"), row("b"))
    start = continued(tmp_path, now)
    assert (start.labels, start.regrouped) == ({1: True, 2: False}, 0)


def test_predictions_are_no_labels_of_a_search(tmp_path: Path) -> None:
    before = claims_of(row("a"), row("b"))
    write_run(tmp_path, before, [True, False])
    path = tmp_path / "before" / "labels.jsonl"
    lines = [orjson.loads(line) for line in path.read_bytes().splitlines()]
    lines[1]["by"] = "predicted"
    lines.append(lines[0] | {"question": "About rest", "choice": "rest", "by": "many-shot"})
    path.write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in lines))
    start = continued(tmp_path, claims_of(row("a"), row("b"), row("rest")))
    assert start.labels == {0: True, 1: None}
    assert (
        "1 claim of before got no label from its search and begins without one"
        in start.notes(file="f", model="m", pool=3, outside=0)[1]
    )


def test_the_digest_is_that_of_its_claims_and_labels(tmp_path: Path) -> None:
    before = claims_of(row("a", 1), row("b", 2))
    digests = []
    for n, (claims, labels) in enumerate(
        [(before, [True, False]), (before, [True, True]), (before[::-1], [False, True]), (before, [True, False])]
    ):
        write_run(tmp_path / str(n), claims, labels)
        digests.append(continued(tmp_path / str(n), before).digest)
    assert digests[0] == digests[3]
    assert len(set(digests)) == 3


def test_a_comparison_and_a_named_testbed_are_matched_by_their_own_words(tmp_path: Path) -> None:
    better = custom_testbed({"choice_2": "y"})
    claims = claims_of(row("a", choice_2="y"), row("a", choice_2="z"), testbed=better)
    write_run(tmp_path, claims[1:], [True])
    assert continued(tmp_path, claims, better).labels == {1: True}
    builtin = TESTBEDS["builtin"]
    claims = claims_of(row("a", choice_2="of no prompt"), row("b"), testbed=builtin)
    write_run(tmp_path, claims, [True, False], testbed="builtin")
    assert continued(tmp_path, claims, builtin).labels == {0: True, 1: False}
    with pytest.raises(BadInput, match=r"were asked as 'Review: .*its labels answer other questions"):
        continued(tmp_path, claims_of(row("a"), row("b")))


def test_a_run_of_a_testbed_goes_on_in_a_file_that_is_put_alike(tmp_path: Path) -> None:
    claims = claims_of(row("a"), row("b"))
    write_run(tmp_path, claims, [True, False], testbed="truthfulQA")
    assert continued(tmp_path, claims).labels == {0: True, 1: False}


def test_a_run_is_found_by_its_name_or_by_its_folder(tmp_path: Path) -> None:
    claims = claims_of(row("a"))
    write_run(tmp_path / "runs", claims, [True])
    for name, runs in (("before", tmp_path / "runs"), (str(tmp_path / "runs" / "before"), tmp_path)):
        assert read_continued(name, runs, DATA, claims, FILE).run == "before"
    with pytest.raises(BadInput, match=r"--continue_from nobody: no run of that name in .*runs, and no run's folder"):
        read_continued("nobody", tmp_path / "runs", DATA, claims, FILE)


def test_what_cannot_be_gone_on_from_is_refused_in_one_line(tmp_path: Path) -> None:
    claims = claims_of(row("a"), row("b"))
    write_run(tmp_path / "1", claims, [None, None], finished=False)
    with pytest.raises(BadInput, match="before holds no labels yet"):
        continued(tmp_path / "1", claims)
    write_run(tmp_path / "2", claims, [True, None])
    with pytest.raises(BadInput, match=r"none of the claims that it labelled is in grown\.jsonl"):
        continued(tmp_path / "2", claims_of(row("b"), row("c")))
    write_run(tmp_path / "3", claims, [True, True])
    with (tmp_path / "3" / "before" / "labels.jsonl").open("ab") as file:
        file.write(b"{torn in the middle\n")
    with pytest.raises(BadInput, match="1 lines of its files are damaged"):
        continued(tmp_path / "3", claims)
    write_run(tmp_path / "4", claims, [True, True], parts=["batch-000"])
    part = tmp_path / "4" / "before" / "batch-000"
    part.mkdir()
    (part / "run.json").write_bytes((tmp_path / "4" / "before" / "run.json").read_bytes())
    with pytest.raises(BadInput, match=r"was labelled in several searches; name one of them, as in before/batch-000"):
        continued(tmp_path / "4", claims)
