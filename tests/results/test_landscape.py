"""What a landscape means: verdicts in every case, the words, the picture and the page."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from src.icm.consistency import Labels
from src.icm.labelings import Evaluated, Kind, Labeling
from src.icm.objective import Evaluation
from src.icm.testbeds import BadInput
from src.results.findings import Verdict
from src.results.landscape import Landscape, compare_objectives
from src.results.landscape_folder import PARTS, LandscapeFolder, labeling_records
from src.results.landscape_view import chart_of, grids_of, write_picture
from src.results.landscape_words import verdict_sentence, words
from src.results.page import render_landscape
from src.results.side_by_side import as_text

GOLD: Labels = tuple(n % 2 == 0 for n in range(20))
NAMES = ("False", "True")


def labelled(name: str, kind: Kind, labels: Labels, utility: float, of: str | None = None) -> Evaluated:
    """Every claim has the same margin, so that U is what it is said to be."""
    odds = {claim: utility if label else -utility for claim, label in enumerate(labels)}
    return Evaluated(Labeling(name, kind, labels, of), Evaluation(odds, 0.0, utility, 0, utility))


def flipped(count: int, seed: int = 0) -> Labels:
    changed = set(np.random.default_rng([count, seed]).permutation(len(GOLD))[:count].tolist())
    return tuple(not label if at in changed else label for at, label in enumerate(GOLD))


def landscape(worth: Callable[[int], float], gold: Labels = GOLD, *more: Evaluated) -> Landscape:
    """Gold, 57 labelings with 1 to 19 labels of it changed, and gold's mirror; worth: U by how many are changed."""
    return Landscape(
        [
            labelled("gold", "gold", GOLD, worth(0)),
            *(
                labelled(f"{count} changed, {seed}", "random", flipped(count, seed), worth(count) + seed / 100)
                for count in range(1, 20)
                for seed in range(3)
            ),
            labelled("mirror of gold", "mirrored", flipped(20), worth(20), "gold"),
            *more,
        ],
        gold,
        1.0,
        NAMES,
    )


def uphill(changed: int) -> float:
    return 20.0 - changed


def test_u_that_falls_with_every_wrong_label_leads_to_truth() -> None:
    found = landscape(uphill)
    assert found.verdict is Verdict.OK
    assert found.correlation == pytest.approx(1.0, abs=0.01)
    assert verdict_sentence(found).startswith("U leads to truth here:")
    told = "\n".join(words(found))
    assert "U of gold is 20.00; no labeling has a higher one." in told
    assert "1 of 1 mirrored labelings have a lower U than their originals; that of gold has 0.00." in told
    assert "at least 0.5" in told
    assert "at least 90%" in told
    assert "at least 75%" in told


def test_a_higher_peak_away_from_gold_makes_it_part_of_the_way() -> None:
    wrong = labelled("chain", "bootstrapped", flipped(4, 9), 30.0)
    found = landscape(uphill, GOLD, wrong)
    assert found.verdict is Verdict.WATCH
    assert found.highest is wrong
    assert found.above_gold == (wrong,)
    assert "part of the way" in verdict_sentence(found)
    assert "80%" in verdict_sentence(found)
    assert "1 labeling has a higher one and agrees with gold on 80%." in "\n".join(words(found))


def test_a_peak_at_gold_and_one_at_its_mirror_are_part_of_the_way() -> None:
    found = landscape(lambda changed: abs(changed - 10.0) - (0.5 if changed > 10 else 0.0))
    assert found.verdict is Verdict.WATCH
    assert found.highest.labeling.name == "gold"
    mirrored = [labelled(f"mirror {at}", "mirrored", flipped(20 - at, 3), 9.0, "gold") for at in range(4)]
    more = landscape(uphill, GOLD, *mirrored)
    assert (more.correlation or 1) < 0.98 < (more.correlation_without_mirrors or 0)
    assert f"{more.correlation_without_mirrors:.2f} without the mirrored ones" in words(more)[0]
    assert "one from several starts (--search ascent) is surer" in verdict_sentence(found)


def test_u_that_knows_nothing_of_gold_does_not_lead_there() -> None:
    found = landscape(lambda changed: float(np.sin(changed * 12.9898) * 43.7))
    assert found.verdict is Verdict.PROBLEM
    assert verdict_sentence(found).startswith("U does not lead to truth for this model and data:")


def test_a_high_peak_far_from_gold_does_not_lead_there() -> None:
    found = landscape(uphill, GOLD, labelled("chain", "bootstrapped", flipped(8, 9), 30.0))
    assert found.verdict is Verdict.PROBLEM
    assert "agree with gold on 60%" in verdict_sentence(found)


def test_inverted_labels_are_named() -> None:
    found = landscape(float)
    assert found.verdict is Verdict.PROBLEM
    assert "gold's inverse (agreement 0%)" in verdict_sentence(found)


def test_one_label_for_all_is_named_with_what_to_do() -> None:
    found = landscape(uphill, GOLD, labelled("all True", "constant", (True,) * 20, 50.0))
    assert found.verdict is Verdict.PROBLEM
    assert "(all True). Try --calibrate mean" in verdict_sentence(found)


def test_labels_that_are_mostly_one_ask_for_more_than_three_quarters() -> None:
    gold: Labels = (True,) * 16 + (False,) * 4
    highest = labelled("a", "bootstrapped", (False, *gold[1:-2], True, True), 9.0)  # 17 of 20
    found = Landscape([highest], gold, 1.0, NAMES)
    assert found.halfway == pytest.approx(0.9)
    assert found.agreement(highest) == pytest.approx(0.85)


def test_without_gold_one_peak_or_several() -> None:
    nothing: Labels = (None,) * 20
    one = landscape(uphill, nothing)
    assert one.verdict is Verdict.UNKNOWN
    assert one.agreement(one.highest) == 1.0
    assert one.highest not in one.compared
    assert "In what was tried there is one" in verdict_sentence(one)
    assert "Whether it is the truth" in verdict_sentence(one)
    two = landscape(uphill, nothing, labelled("chain", "bootstrapped", flipped(15, 9), 20.0))
    assert "There are several: 1 labeling with nearly the highest U agrees" in verdict_sentence(two)
    assert "25% to 25%" not in verdict_sentence(two)
    assert "on 25% of the claims" in verdict_sentence(two)
    assert "Agreement below is with its labels, not with the truth" in "\n".join(words(two))


def test_some_gold_labels_are_enough_to_compare_with() -> None:
    some = tuple(label if at < 10 else None for at, label in enumerate(GOLD))
    assert landscape(uphill, some).has_gold
    part = Landscape(landscape(uphill).evaluated[1:], some, 1.0, NAMES)  # gold is no labeling then
    assert "Gold is known of 10 of the 20 claims" in "\n".join(words(part))
    assert not landscape(uphill, (*some[:9], *(None,) * 11)).has_gold


def test_equal_labelings_count_once() -> None:
    again = labelled("found", "found", GOLD, 20.0)
    found = landscape(uphill, GOLD, again)
    assert len(found.distinct) == len(landscape(uphill).distinct)
    assert found.highest.labeling.name == "gold"
    assert not found.above_gold


def test_objectives_are_compared_on_the_same_labelings() -> None:
    wrong = labelled("chain", "bootstrapped", flipped(4, 9), 30.0)
    compared = {each.objective: each for each in compare_objectives(landscape(uphill, GOLD, wrong))}
    mean = compared["mean margin"]
    assert mean.at_highest == pytest.approx(0.8)
    assert mean.above_gold == 1
    # Its margins are all positive, as are those of all others but gold's mirror (0).
    right = compared["share predicted right"]
    assert right.above_gold == 0
    assert right.at_highest < 0.6
    assert mean.correlation is not None
    assert right.correlation is not None
    assert mean.correlation > right.correlation


def test_what_was_made_from_gold_is_no_labeling_without_gold() -> None:
    corrupted = labelled("gold, 1 changed", "corrupted gold", flipped(1, 7), 40.0)
    mirror = labelled("mirror of it", "mirrored", flipped(19, 7), 41.0, corrupted.labeling.name)
    found = landscape(uphill, GOLD, corrupted, mirror)
    assert not [each for each in found.without_gold if each in (corrupted, mirror)]
    assert all(each.labeling.of != "gold" for each in found.without_gold)
    assert found.without_gold[0].labeling.kind == "random"
    searched = labelled("a run", "found", GOLD, 20.0)
    assert searched in landscape(uphill, GOLD, searched).without_gold


def test_the_picture_and_the_page_show_it(tmp_path: Path) -> None:
    searched = labelled("<script>alert(1)</script>", "found", flipped(2, 5), 19.0)
    found = landscape(uphill, GOLD, searched)
    page = render_landscape(found, "builtin, 20 claims & <b>more</b>")
    assert verdict_sentence(found) in page
    assert "<script>alert" not in page
    assert "&lt;b&gt;more" in page
    for wanted in (
        "mean margin",
        "sum of log-likelihoods",
        "Labelings by kind",
        "agreement with gold",
        "gold: U 20.00",
    ):
        assert wanted in page, wanted
    write_picture(found, tmp_path / "a.png", "builtin, 20 claims")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_gold_and_found_stand_out_in_the_picture() -> None:
    same, other = labelled("run-1", "found", GOLD, 20.0), labelled("run-2", "found", flipped(2, 5), 18.0)

    def names(*found: Evaluated) -> set[str]:
        return {text.get_text() for text in chart_of(landscape(uphill, GOLD, *found)).figure.axes[0].texts}

    assert names(same) == {"gold, found"}
    assert names(other) == {"gold", "found"}
    assert names(same, other) == {"gold, run-1", "run-2"}


def test_the_tables_say_what_there_is() -> None:
    broken = labelled("chain", "bootstrapped", flipped(3, 8), 9.0)
    broken = replace(broken, evaluation=replace(broken.evaluation, inconsistent=4))
    text = as_text(grids_of(landscape(uphill, GOLD, broken)))
    assert "mean margin alone" in text
    [row] = [line for line in text.splitlines() if line.strip().startswith("bootstrapped")]
    assert row.split() == ["bootstrapped", "1", "9.00", "9.00", "9.00", "0.85", "4"]
    assert "mean margin alone" not in as_text(grids_of(landscape(uphill)))


@pytest.mark.parametrize("names", [NAMES, ("negative", "neutral", "positive")])
def test_the_file_gives_the_labelings_back(names: tuple[str, ...], tmp_path: Path) -> None:
    labels: Labels = (True, False) if len(names) == 2 else (2, 0)
    odds = {0: 0.1 + 0.2, 1: -1.5} if len(names) == 2 else {0: (0.1 + 0.2, 1.0), 1: (2.0, -3.0)}
    each = Evaluated(Labeling("a", "mirrored", labels, "b"), Evaluation(odds, 0.0, 0.0, 0, 0.0))
    folder = LandscapeFolder(tmp_path)
    assert folder.read() is None
    folder.write(dict.fromkeys(PARTS) | {"labelings": labeling_records([each], names)})
    document = folder.read()
    assert document is not None
    assert folder.labelings(document, names) == [(each.labeling, tuple(odds.values()))]


def test_a_damaged_file_is_one_line(tmp_path: Path) -> None:
    folder = LandscapeFolder(tmp_path)
    whole: dict[str, Any] = dict.fromkeys(PARTS) | {
        "labelings": labeling_records([labelled("a", "random", GOLD, 1.0)], NAMES)
    }
    for damaged in (
        [whole["labelings"][0] | {"labels": ["something else"] * 20}],
        [whole["labelings"][0] | {"log_odds": [1.0]}],
        [{"name": "a"}],
        None,
    ):
        with pytest.raises(BadInput, match=r"landscape.json: cannot be read"):
            folder.labelings(whole | {"labelings": damaged}, NAMES)
    folder.write({"labelings": []})
    with pytest.raises(BadInput, match="cannot be read"):
        folder.read()
    folder.document_path.write_text("{")
    with pytest.raises(BadInput, match="cannot be read"):
        folder.read()
    folder.document_path.write_text("{}")
    with pytest.raises(BadInput, match="another version"):
        folder.read()


def test_labels_hardly_better_than_one_for_all_do_not_lead_to_truth() -> None:
    """Of 20 claims 2 are true: one label for all is right for 90%, and so are labels that have one of them wrong."""
    gold: Labels = tuple(n < 2 for n in range(20))
    near = (True, False, True, *(False for _ in range(17)))
    labelings = [
        labelled("gold", "gold", gold, 10.0),
        labelled("near", "random", near, 20.0),
        *(
            labelled(
                f"{count} wrong",
                "random",
                tuple(not label if at < count else label for at, label in enumerate(near)),
                -count,
            )
            for count in range(1, 19)
        ),
    ]
    found = Landscape(labelings, gold, 1.0, NAMES)
    assert found.agreement(found.highest) == 0.9
    assert found.verdict is not Verdict.OK
    assert "95% of the claims" in "\n".join(words(found))


def test_few_labelings_have_no_interval() -> None:
    few = [
        labelled("gold", "gold", GOLD, 5.0),
        *(labelled(f"{n} changed", "random", flipped(n), 5.0 - n) for n in range(1, 6)),
    ]
    found = Landscape(few, GOLD, 1.0, NAMES)
    assert found.interval is None
    assert "too few for an interval" in "\n".join(words(found))
    assert found.verdict is not Verdict.OK
