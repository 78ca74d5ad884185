"""--columns and --map, and how the columns of a file are known."""

from __future__ import annotations

import pytest

from src.icm.columns import Reading, parse_columns, parse_values
from src.icm.values import BadInput


def read(reading: Reading, fields: dict[str, object]) -> dict[str, object]:
    return reading.row(fields, reading.names(list(fields)))


def test_case_and_space_around_a_name_do_not_count() -> None:
    fields = {"Question": "q", " choice": "c", "LABEL ": 1, "\ufeffAnswer": 7, "Other Column": 2}
    assert read(Reading(), fields) == {"question": "q", "choice": "c", "label": 1, "answer": 7, "Other Column": 2}


def test_two_columns_that_are_one_are_refused() -> None:
    with pytest.raises(BadInput, match="'Choice' and ' choice', which are both choice"):
        Reading().names(["question", "Choice", " choice"])
    Reading().names(["Other", "other"])  # not read


def test_columns_move_and_are_not_read_twice() -> None:
    reading = Reading(columns=parse_columns("question=prompt, choice=answer"))
    fields = {"Prompt": "p", "answer": "a", "choice": "not this one", "label": 1}
    assert read(reading, fields) == {"question": "p", "choice": "a", "label": 1}


def test_values_are_mapped_without_case_space_or_a_float_s_zero() -> None:
    reading = Reading(values=parse_values(["label=Yes:true,no:false,-1:false,2:true"]))
    for value, mapped in (("YES ", "true"), ("No", "false"), (-1, "false"), (2.0, "true"), (1, 1), (None, None)):
        assert read(reading, {"label": value}) == {"label": mapped}
    assert parse_values(["label=a:b:0", "label=c:1", "answer=x:y"]) == {
        "label": {"a:b": "0", "c": "1"},
        "answer": {"x": "y"},
    }


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("questoin=prompt", "no column 'questoin' is read; did you mean 'question'?"),
        ("knwon=mine", "no column 'knwon' is read; did you mean 'known'?"),
        ("prompt", "is not OURS=THEIRS"),
        ("question=", "is not OURS=THEIRS"),
        ("question=a,question=b", "names 'question' twice"),
        ("question=a,choice=a", "names 'a' twice"),
    ],
)
def test_columns_that_cannot_be_meant(text: str, complaint: str) -> None:
    with pytest.raises(BadInput) as caught:
        parse_columns(text)
    assert complaint in str(caught.value)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("lable=yes:true", "no column 'lable' is read; did you mean 'label'?"),
        ("label", "is not THEIRS:OURS"),
        ("label=yes", "is not THEIRS:OURS"),
        ("label=:true", "is not THEIRS:OURS"),
        ("label=yes:", "is not THEIRS:OURS"),
        ("label=yes:true,Yes:false", "says twice what 'Yes' means"),
    ],
)
def test_maps_that_cannot_be_meant(text: str, complaint: str) -> None:
    with pytest.raises(BadInput) as caught:
        parse_values([text])
    assert complaint in str(caught.value)


def test_a_flag_for_a_column_that_is_not_there_names_the_nearest() -> None:
    with pytest.raises(BadInput, match="--columns question=promt: there is no column 'promt'; did you mean 'prompt'"):
        Reading(columns={"question": "promt"}).check(["prompt", "x"])
    with pytest.raises(BadInput, match="--map label: there is no column 'label'; there are: 'prompt', 'x'"):
        Reading(values={"label": {}}).check(["prompt", "x"])
    Reading(columns={"label": "gold"}, values={"label": {}}).check(["Gold"])
