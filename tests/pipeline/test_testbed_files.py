"""Testbeds that are files: where they and their data are, code in a .py file, complaints with the file's name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from src.icm.consistency import Relation
from src.icm.testbeds import BadInput
from src.pipeline import testbed_files
from src.pipeline.datafiles import load_testbed_file
from src.pipeline.testbed_files import read_testbed

EXAMPLES = Path(__file__).resolve().parents[2] / "docs" / "examples"
TESTBED = 'template: "{choice}:"\nlabels: [no, yes]\ndata: claims.csv\ncolumns: {choice: text}\n'


def write(folder: Path, text: str = TESTBED, name: str = "mine.yaml") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    return folder / name


def test_names_and_files_are_told_apart() -> None:
    assert testbed_files.testbed_path("builtin") is None
    assert testbed_files.testbed_path("truthfulQA-preference") is None
    assert [testbed_files.testbed_path(name) for name in ("a.yaml", "b/a.yml", "a.py")] == [
        Path("a.yaml"),
        Path("b/a.yml"),
        Path("a.py"),
    ]


def test_data_is_beside_the_file_or_in_the_data_folder_or_named(tmp_path: Path) -> None:
    file = write(tmp_path / "here")
    there, other = tmp_path / "there", tmp_path / "other.csv"
    testbed = read_testbed(file)
    with pytest.raises(BadInput, match=re.escape(f"{file}: data: there is neither {file.parent / 'claims.csv'} nor")):
        load_testbed_file(testbed, file, there)
    write(there, "text,label\nin the folder,yes\n", "claims.csv")
    assert load_testbed_file(testbed, file, there)[1][0].text == "in the folder:"
    write(file.parent, "text,label\nbeside,no\n", "claims.csv")
    found, [claim], path = load_testbed_file(testbed, file, there)
    assert (claim.text, claim.gold, path) == ("beside:", False, file.parent / "claims.csv")
    assert (found.name, found.grouped_by) == ("mine", "none"), "the template shows no question to group by"
    other.write_text("text,label\nnamed,yes\n")
    assert load_testbed_file(testbed, file, there, other)[1][0].text == "named:"
    nowhere = write(tmp_path, TESTBED.replace("data: claims.csv\n", ""), "nowhere.yaml")
    with pytest.raises(BadInput, match="says no data file"):
        load_testbed_file(read_testbed(nowhere), nowhere, there)


@pytest.mark.parametrize(
    ("more", "rows", "grouped_by", "groups"),
    [
        ("", "text,label,consistency_id\na,no,1\nb,no,1\n", "consistency_id", 1),
        ("groups: none\n", "text,label\na,no\nb,no\n", "none", 2),
        ("required: [question]\n", "text,label,question\na,no,q\nb,no,q \n", "question", 1),
    ],
)
def test_what_makes_groups_is_as_said_or_as_the_data_has_it(
    tmp_path: Path, more: str, rows: str, grouped_by: str, groups: int
) -> None:
    file = write(tmp_path, TESTBED + more)
    write(tmp_path, rows, "claims.csv")
    testbed, claims, _ = load_testbed_file(read_testbed(file), file, tmp_path)
    assert testbed.grouped_by == grouped_by
    assert len({claim.group for claim in claims}) == groups


@pytest.mark.parametrize(
    ("more", "rows", "complaint"),
    [
        ("", "words,label\na,no\n", "columns: choice: text: there is no column 'text'"),
        ("map: {label: {n: no}}\n", "text\na\n", "map: label: there is no column 'label'"),
        (
            "required: [question]\n",
            "text,label\na,no\n",
            r"lacks the column question.*as in columns: {question: THEIRS}",
        ),
        ("", "text,label\na,n\nb,n\n", r"claims.csv:2: row 0 has the label 'n', .*as in map: {label: {'n': 'yes'}}"),
        ("groups: consistency_id\n", "text,label\na,no\n", "no column consistency_id to groups; name it by columns: "),
        ("groups: question\n", "text,label\na,no\n", "groups: question, and the template shows no {question}"),
        ("groups: none\n", "text,label,consistency_id\na,no,1\n", "groups: none is for files without one"),
    ],
)
def test_complaints_are_in_the_words_of_a_file_not_of_flags(
    tmp_path: Path, more: str, rows: str, complaint: str
) -> None:
    file = write(tmp_path, TESTBED + more)
    write(tmp_path, rows, "claims.csv")
    with pytest.raises(BadInput, match=complaint) as refused:
        load_testbed_file(read_testbed(file), file, tmp_path)
    assert "--columns" not in str(refused.value)
    assert "--map" not in str(refused.value)
    assert "\n" not in str(refused.value)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=re.escape(f"{tmp_path / 'none.yaml'}: not found")):
        read_testbed(tmp_path / "none.yaml")
    (tmp_path / "utf16.yaml").write_bytes("template: x".encode("utf-16"))
    with pytest.raises(BadInput, match=r"utf16.yaml: cannot be read"):
        read_testbed(tmp_path / "utf16.yaml")
    bad = write(tmp_path, "template: 1", "bad.yaml")
    with pytest.raises(BadInput, match=re.escape(f"{bad}: template: shows no column")):
        read_testbed(bad)


def test_a_py_file_relates_claims_by_a_rule_of_its_own() -> None:
    file = EXAMPLES / "sums.py"
    testbed, claims, path = load_testbed_file(read_testbed(file), file, Path("nowhere"))
    assert (testbed.name, path.name, len(claims)) == ("sums", "sums.csv", 9)
    found = testbed.consistency(claims, "gold-free").constraints
    assert [(c.claims, c.relation) for c in found] == [
        (pair, Relation.AT_MOST_ONE) for pair in ((0, 1), (1, 2), (3, 4), (5, 6), (7, 8))
    ]


def test_a_py_file_s_digest_is_that_of_its_code(tmp_path: Path) -> None:
    code = (EXAMPLES / "sums.py").read_text()
    before = read_testbed(write(tmp_path, code, "sums.py"))
    after = read_testbed(write(tmp_path, code.replace("== 0", "== 1"), "sums.py"))
    assert before.digest == read_testbed(EXAMPLES / "sums.py").digest != after.digest


@pytest.mark.parametrize(
    ("code", "complaint"),
    [
        ("x = 1\n", "defines no TESTBED = Testbed"),
        ("x = 1\ny = (\n", r"mine.py:2: is not Python"),
        ("import sys\n\nsys.exit(3)\n", r"mine.py:3: SystemExit: 3"),
        ("def f():\n    return 1 / 0\n\n\nTESTBED = f()\n", r"mine.py:2: ZeroDivisionError: division by zero"),
    ],
)
def test_py_files_that_fail_are_refused_in_one_line(tmp_path: Path, code: str, complaint: str) -> None:
    with pytest.raises(BadInput, match=complaint):
        read_testbed(write(tmp_path, code, "mine.py"))
