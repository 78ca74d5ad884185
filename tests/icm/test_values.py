"""Cells as people's files have them."""

from __future__ import annotations

import math

import pytest

from src.icm.consistency import Relation
from src.icm.values import BadInput, BadLabel, group_of, is_missing, options_of, parse_label, parse_relation, text_of

NAN = math.nan


def gold(choice: object, label: object = None) -> list[bool | None]:
    options = options_of(choice, label)
    assert options is not None
    return [option.gold for option in options]


@pytest.mark.parametrize("value", [None, NAN, "", "  \n"])
def test_nothing_in_a_cell_is_missing(value: object) -> None:
    assert is_missing(value)
    assert group_of(value) is None
    assert parse_label(value) is None


@pytest.mark.parametrize("value", [0, False, 0.0, "0", "NaN", "None", [], math.inf])
def test_zero_and_texts_are_not_missing(value: object) -> None:
    assert not is_missing(value)


@pytest.mark.parametrize("value", ["nan", "NaN", "<NA>", "None", "null"])
def test_a_missing_id_that_became_text_names_no_group(value: str) -> None:
    assert group_of(value) is None
    assert parse_label(value) is None


def test_ids_keep_their_spelling() -> None:
    assert [group_of(value) for value in (0, "0", 3.0, " a", "NA")] == ["0", "0", "3.0", " a", "NA"]


@pytest.mark.parametrize("value", [True, 1, 1.0, "1.0", "TRUE", " true "])
def test_true_labels(value: object) -> None:
    assert parse_label(value) is True


@pytest.mark.parametrize("value", [-1, "yes", "A", 0.5, math.inf, [1], {}])
def test_what_is_no_label_is_refused_with_its_value(value: object) -> None:
    with pytest.raises(BadLabel) as caught:
        parse_label(value)
    assert caught.value.value is value


def test_whole_numbers_that_pandas_made_floats_are_one_answer() -> None:
    assert text_of("answer", 7.0) == text_of("answer", 7) == "7"
    assert text_of("answer", 7.5) == "7.5"
    assert text_of("choice", 7.0) == "7.0"


@pytest.mark.parametrize("value", [["a"], {"a": 1}, b"a"])
def test_lists_and_bytes_are_no_texts(value: object) -> None:
    with pytest.raises(BadInput, match=f"holds a {type(value).__name__} in question"):
        text_of("question", value)


@pytest.mark.parametrize(
    ("text", "relation"),
    [
        ("exactly one", Relation.EXACTLY_ONE),
        ("Exactly_One", Relation.EXACTLY_ONE),
        ("at-most-one", Relation.AT_MOST_ONE),
        ("at most one is true", Relation.AT_MOST_ONE),
        ("agree", Relation.AGREE),
        ("none", None),
    ],
)
def test_relations(text: str, relation: Relation | None) -> None:
    assert parse_relation(text) is relation


def test_another_relation_is_refused_with_those_there_are() -> None:
    with pytest.raises(BadInput, match="'born in', which is none of: exactly one, at most one, agree, different, none"):
        parse_relation("born in")


def test_one_text_lists_no_options() -> None:
    assert options_of("Yes", 1) is None
    assert options_of(None, 1) is None


@pytest.mark.parametrize("label", [1, "1", 1.0, "B", "b", "No", " No ", [0, 1, 0], [False, True, False]])
def test_the_right_option_is_told_by_index_letter_text_or_list(label: object) -> None:
    assert gold(["Yes", "No", "Maybe"], label) == [False, True, False]


@pytest.mark.parametrize("label", [None, NAN, "", -1, "-1", "None"])
def test_the_right_option_may_be_unknown(label: object) -> None:
    assert gold(["Yes", "No"], label) == [None, None]


def test_options_of_a_hugging_face_data_set_go_by_their_names() -> None:
    choice = {"text": ["a", "b", "c"], "label": ["1", "2", "3"]}
    assert gold(choice, "1") == [True, False, False]  # the name, not the index
    assert gold(choice, "c") == [False, False, True]
    assert gold({"text": ["a", "b"]}, 0) == [True, False]


def test_a_number_is_an_index_unless_an_option_is_that_number() -> None:
    assert gold(["2", "3", "4"], 2) == [False, False, True]
    assert gold(["None", "Some"], "None") == [True, False]
    for options, label in ((["2", "3", "4"], "2"), ([2, 3, 4], 2), (["B", "A"], "A")):
        with pytest.raises(BadInput, match=r"could be option 0, '(2|B)' or option"):
            options_of(options, label)


@pytest.mark.parametrize(
    ("choice", "label", "complaint"),
    [
        (["Yes", "No"], 2, "names none of its 2 options"),
        (["Yes", "No"], "C", "names none of its 2 options"),
        (["Yes", "No"], True, "names none of its 2 options"),
        (["Yes", "No"], [1], "has 1 labels for its 2 options"),
        (["Yes", "No"], ["x", 1], "neither 0/1 nor true/false"),
        (["Yes"], 0, "lists 1 option in choice"),
        ([], 0, "lists 0 options in choice"),
        (["Yes", None], 0, "an option in choice with nothing in it"),
        (["Yes", NAN], 0, "an option in choice with nothing in it"),
        (["Yes", "Yes"], 0, "lists the option 'Yes' twice"),
        ([["Yes"], "No"], 0, "holds a list in choice"),
        ({"text": ["a", "b"], "label": ["A"]}, "A", "2 options in choice and 1 names"),
        ({"a": 1}, 0, "a dict of options has two lists"),
        ({"text": "a"}, 0, "a dict of options has two lists"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(choice: object, label: object, complaint: str) -> None:
    with pytest.raises(BadInput) as caught:
        options_of(choice, label)
    assert complaint in str(caught.value)
