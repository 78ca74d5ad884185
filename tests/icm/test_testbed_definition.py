"""A testbed file's text: what it makes of rows, and how it is refused in one line that names the key."""

from __future__ import annotations

import pytest

from src.icm import testbeds
from src.icm.consistency import Relation
from src.icm.testbeds.definition import parse_definition, parse_testbed
from src.icm.values import BadInput, parse_label

SENTIMENT = """
template: "Review: {choice}\\nThe review is"
labels: [negative, neutral, positive]
map: {label: {1: negative, 2: neutral, 3: positive}}
"""
YES_NO = """
template: "{choice}\\nIs it so?"
labels: [no, yes]
"""


def test_words_are_words_and_not_yaml_s_booleans_or_numbers() -> None:
    testbed = parse_testbed(YES_NO, "mine")
    assert testbed.space.names == ("no", "yes")
    assert testbed.space.texts == (" no", " yes")
    stars = parse_testbed('template: "{choice}:"\nlabels: {1: " one", 2: " two", on: " three"}', "mine")
    assert stars.space.names == ("1", "2", "on")
    assert stars.space.texts == (" one", " two", " three")


@pytest.mark.parametrize(
    ("value", "gold"),
    [("yes", True), (" No ", False), ("YES", True), (None, None), ("", None), (float("nan"), None), ("null", None)],
)
def test_of_two_labels_the_second_is_true(value: object, gold: bool | None) -> None:
    claim = parse_testbed(YES_NO, "mine").claim({"choice": "c", "label": value}, 0)
    assert claim.gold is gold


@pytest.mark.parametrize("value", [True, 1, 0, "true", "maybe"])
def test_a_gold_label_that_is_no_name_is_refused_with_the_names(value: object) -> None:
    with pytest.raises(BadInput, match="which is none of no, yes"):
        parse_testbed(YES_NO, "mine").claim({"choice": "c", "label": value}, 0)


def test_of_three_labels_gold_is_the_index_and_values_are_mapped() -> None:
    testbed = parse_testbed(SENTIMENT, "mine")
    names = testbed.reading.names(["choice", "label"])
    rows = [testbed.reading.row({"choice": "c", "label": value}, names) for value in (1, 2, 3.0, "3", "neutral", None)]
    assert [testbed.claim(row, 0).gold for row in rows] == [0, 1, 2, 2, 1, None]


def test_names_that_are_numbers_are_told_by_what_a_file_has() -> None:
    space = parse_testbed('template: "{choice}:"\nlabels: [1, 2, 3]', "mine").space
    assert [parse_label(value, space) for value in (1, "2", 3.0)] == [0, 1, 2]


def test_a_label_called_none_is_no_missing_value() -> None:
    space = parse_testbed('template: "{choice}:"\nlabels: [none, some]', "mine").space
    assert parse_label("none", space) is False
    assert parse_label("null", space) is None


def test_a_template_shows_any_column_and_items_of_a_list() -> None:
    testbed = parse_testbed('template: "{{{Topic}}} {question} {choice[0]}/{choice[1]}:"\nlabels: [A, B]', "mine")
    assert testbed.columns == ("question", "choice", "Topic")
    claim = testbed.claim({"Topic": "t", "question": "q?", "choice": ["x", "y"], "label": "B"}, 4)
    assert claim.text == "{t} q? x/y:"
    assert (claim.gold, claim.choice) == (True, "x | y")
    fields = {"question": claim.question, "choice": claim.choice, **dict(claim.shown)}
    assert testbed.text(fields) == claim.text, "from what a run keeps"
    same = testbed.claim({"Topic": "t", "question": "q?", "choice": {"text": ["x", "y"]}, "label": "B"}, 5)
    assert same.text == claim.text


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        (
            {"question": "q", "choice": ["x", "y", "z"], "Topic": "t"},
            r"lists 3 items in choice, and the template shows it up to \[1\]",
        ),
        ({"question": "q", "choice": ["x", ""], "Topic": "t"}, r"has nothing in choice\[1\]"),
        ({"question": "q", "choice": "x", "Topic": "t"}, "has no list in choice"),
        ({"question": "q", "choice": ["x", "y"]}, "lacks the column Topic"),
        ({"question": "q", "choice": ["x", "y"], "Topic": ""}, "has nothing in Topic"),
    ],
)
def test_rows_that_a_template_cannot_show_are_refused(row: dict[str, object], complaint: str) -> None:
    testbed = parse_testbed('template: "{Topic} {question} {choice[0]}/{choice[1]}:"\nlabels: [A, B]', "mine")
    with pytest.raises(BadInput, match=complaint):
        testbed.claim(row, 0)


def test_two_claims_that_differ_in_another_column_are_not_the_same() -> None:
    testbed = parse_testbed('template: "{place} {choice}:"\nrelations: identical_agree\ngroups: consistency_id', "mine")
    rows = [{"choice": "c", "place": place, "consistency_id": 1} for place in ("here", "there", "here")]
    found = testbed.consistency([testbed.claim(row, at) for at, row in enumerate(rows)], "gold-free").constraints
    assert [(c.claims, c.relation) for c in found] == [((0, 2), Relation.AGREE)]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("none", []),
        ("identical_agree", [((0, 1), Relation.AGREE)]),
        ("exactly_one", [((0, 1, 2), Relation.EXACTLY_ONE)]),
        ("at_most_one", [((0, 1, 2), Relation.AT_MOST_ONE)]),
        ("agree", [((0, 1, 2), Relation.AGREE)]),
        (
            "same_answer",
            [((0, 1), Relation.AGREE), ((0, 2), Relation.AT_MOST_ONE), ((1, 2), Relation.AT_MOST_ONE)],
        ),
    ],
)
def test_relations_by_name(name: str, expected: list[object]) -> None:
    testbed = parse_testbed(f'template: "{{choice}}:"\nrelations: {name}', "mine")
    rows = [{"choice": choice, "answer": choice, "consistency_id": 1} for choice in ("x", "x", "y")]
    found = testbed.consistency([testbed.claim(row, at) for at, row in enumerate(rows)], "gold-free").constraints
    assert [(c.claims, c.relation) for c in found] == expected


def test_what_a_run_keeps_of_a_file_gives_the_same_texts_and_labels() -> None:
    testbed = parse_testbed(SENTIMENT + 'separator: "\\n--\\n"\nstrip_newlines: true', "mine")
    again = testbeds.recorded_testbed("gsm8k", testbed.record(), compares=False)
    assert (again.template, again.space, again.separator) == (testbed.template, testbed.space, testbed.separator)
    assert again.text({"choice": "a\nb"}) == "Review: ab\nThe review is"
    with pytest.raises(BadInput, match="testbed: the run's record of it is damaged"):
        testbeds.recorded_testbed("gsm8k", {"template": "{choice}"}, compares=False)


@pytest.mark.parametrize(
    "change",
    [
        ("The review is", "It is"),
        ("[negative, neutral, positive]", "[neutral, negative, positive]"),
        ("[negative, neutral, positive]", '{negative: " bad", neutral: " so", positive: " good"}'),
        ("3: positive", "3: negative"),
        ("labels:", 'separator: "--"\nlabels:'),
        ("labels:", "strip_newlines: true\nlabels:"),
        ("labels:", "groups: none\nlabels:"),
        ("labels:", "relations: agree\nlabels:"),
        ("labels:", "columns: {choice: text}\nlabels:"),
    ],
)
def test_the_digest_tells_what_decides_a_prompt(change: tuple[str, str]) -> None:
    before = parse_testbed(SENTIMENT, "mine").digest
    assert parse_testbed(SENTIMENT.replace(*change), "mine").digest != before


def test_the_digest_does_not_tell_comments_nor_where_the_data_is() -> None:
    before = parse_testbed(SENTIMENT, "mine").digest
    assert parse_testbed("# mine\ndata: a.csv\nabout: reviews" + SENTIMENT, "other").digest == before


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "holds no keys"),
        ("- a", "holds no keys"),
        ("template: [", "is not YAML"),
        ("labels: [a, b]", "template: is missing"),
        ('template: "{choice}"\ntemplates: x', "there is no key 'templates'; did you mean 'template'"),
        ('template: "{choice}"\ntemplate: "{question}"', "line 2: has the key 'template' twice"),
        ('template: "Hello"', "template: shows no column"),
        ('template: "{choice"', "template: .*brace"),
        ('template: "{choice!r}"', "template: {choice} is neither a column"),
        ('template: "{choice.__class__}"', "template: shows neither"),
        ('template: "{choice} ({label}):"', "template: shows {label}, the gold label"),
        ('template: "{choice[x]}"', r"template: {choice\[x\]} is neither"),
        ('template: "{text}:"', "template: shows neither {question} nor {choice}"),
        ('template: "{choice}: "', "template: ends in ' '"),
        ('template: "{choice}:"\nlabels: [a]', "labels: there are 1; give 2 to 20"),
        ('template: "{choice}:"\nlabels: [a, a]', "labels: one of them is there twice"),
        ('template: "{choice}:"\nlabels: [a, A]', "labels: two of them differ in case"),
        ('template: "{choice}:"\nlabels: {a: " x", b: " x"}', "labels: the text ' x' is there twice"),
        ('template: "{choice}:"\nlabels: yes', "labels: is neither a list of names nor"),
        ('template: "{choice}:"\nlabels: {a: [x], b: y}', "labels: is neither a list of names nor"),
        ('template: "{choice}:"\nseparator: ""', "separator: is empty"),
        ('template: "{choice}:"\ngroups: rows', "groups: 'rows' is none of consistency_id, question, none"),
        ('template: "{choice}:"\nrelations: opposites', "relations: 'opposites' is none of identical_agree"),
        ('template: "{choice}:"\nstrip_newlines: perhaps', "strip_newlines: "),
        ('template: "{choice}:"\ncolumns: {chioce: text}', "no column 'chioce' is read; did you mean 'choice'"),
        ('template: "{choice}:"\ncolumns: {choice: a, label: a}', "columns: names 'a' twice"),
        ('template: "{choice}:"\nmap: {verdict: {a: b}}', "map: no column 'verdict' is read"),
        (SENTIMENT.replace("3: positive", "3: postive"), "there is no label 'postive'; did you mean 'posi"),
        (SENTIMENT.replace("3: positive", "1.0: positive").replace("1.0", "'1 '"), "map: label: says twice what '1'"),
        (SENTIMENT + "relations: exactly_one", "relations: exactly_one says which claim is true, and there are 3"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_meant_are_refused_in_one_line(text: str, complaint: str) -> None:
    with pytest.raises(BadInput, match=complaint) as refused:
        parse_testbed(text, "mine")
    assert "\n" not in str(refused.value)


def test_of_three_labels_none_is_true() -> None:
    testbed = parse_testbed(SENTIMENT, "mine")
    row = {"choice": "c", "consistency_relation": "exactly one"}
    with pytest.raises(BadInput, match="which needs two labels; there are 3"):
        testbed.claim(row, 0)
    with pytest.raises(BadInput, match="the template shows them"):
        testbed.claims({"choice": ["a", "b", "c"]}, 0, 0)
    claims = [testbed.claim({"choice": "c", "label": "neutral"}, at) for at in range(2)]
    with pytest.raises(BadInput, match="keys of two labels, and there are 3"):
        testbed.consistency(claims, "upstream")


def test_a_template_that_begins_with_a_column_imitates_nothing_by_that() -> None:
    testbed = parse_testbed(YES_NO, "mine")
    assert not testbed.imitates(testbed.claim({"choice": "two\nlines"}, 0))
    assert testbed.imitates(testbed.claim({"choice": "two\nIs it so? yes"}, 0))


def test_the_files_of_the_package_are_complete() -> None:
    assert list(testbeds.DEFINITIONS) == list(testbeds.TESTBEDS)
    assert all(definition.about for definition in testbeds.DEFINITIONS.values())
    assert parse_definition('template: "{choice}:"').testbed("x").separator == "\n\n"
