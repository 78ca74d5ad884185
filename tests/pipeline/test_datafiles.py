"""Every bad file gets one line that names file and line."""

from __future__ import annotations

import gzip
import json
import math
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from src.icm.columns import Reading, parse_values
from src.icm.consistency import Relation
from src.icm.testbeds import TESTBEDS, BadInput
from src.pipeline.datafiles import claims_of, load_data_file, load_testbed, read_rows
from src.pipeline.file_kinds import digest_of

ROWS = [{"question": "q", "choice": "a", "label": 1}, {"question": "q", "choice": "b", "label": 0}]


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "text", "lines"),
    [
        ("d.json", json.dumps(ROWS, indent=2), [2, 7]),
        ("d.json", json.dumps(ROWS), [1, 1]),
        ("d.json", "\ufeff \n" + json.dumps(ROWS), [2, 2]),
        ("d.jsonl", "\n".join(map(json.dumps, ROWS)) + "\n\n", [1, 2]),
        ("d.csv", "question,choice,label\nq,a,1\nq,b,0\n", [2, 3]),
        ("d.csv", 'question,choice,label\nq,"a\nmore",1\nq,b,0\n', [2, 4]),
    ],
)
def test_rows_know_their_lines(tmp_path: Path, name: str, text: str, lines: list[int]) -> None:
    rows = read_rows(written(tmp_path, name, text))
    assert [row.line for row in rows] == lines
    assert [row.fields["question"] for row in rows] == ["q", "q"]


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("d.json", "", "is empty"),
        ("d.json", "  \n", "is empty"),
        ("d.json", "[]", "holds no rows"),
        ("d.json", '{"a": 1}', "d.json:1: is not a JSON list"),
        ("d.json", '[{"a": 1},\n{"a": }]', "d.json:2: is not valid JSON"),
        ("d.json", '[{"a": 1}', "expected , or ]"),
        ("d.json", '[{"a": 1}] more', "text after its closing"),
        ("d.json", "[\n1]", "d.json:2: holds a int"),
        ("d.jsonl", "[1]", "d.jsonl:1: holds a list"),
        ("d.csv", "a,b\n1,2,3\n", "d.csv:2: has more fields"),
        ("d.txt", "x", "unknown kind of file"),
        ("d.jsonl", '{"a": 1' + "0" * 5000 + "}", "d.jsonl:1: is not valid JSON"),
        ("d.json", '[{"a": 1' + "0" * 5000 + "}]", "d.json:1: is not valid JSON"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, text: str, complaint: str) -> None:
    path = written(tmp_path, name, text)
    with pytest.raises(BadInput) as caught:
        read_rows(path)
    assert complaint in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_folder_and_binary_files(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="not found"):
        read_rows(tmp_path / "none.json")
    folder = tmp_path / "folder.json"
    folder.mkdir()
    with pytest.raises(BadInput, match="is a folder"):
        read_rows(folder)
    (tmp_path / "b.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadInput, match="not UTF-8"):
        read_rows(tmp_path / "b.json")


def test_deeply_nested_json_is_refused_not_crashed(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"not valid JSON|nested too deeply"):
        read_rows(written(tmp_path, "d.json", "[" * 100_000))


def test_a_row_without_its_columns_is_named_with_its_line(tmp_path: Path) -> None:
    path = written(tmp_path, "d.jsonl", '{"question": "q", "choice": "a"}\n{"question": "q"}\n')
    with pytest.raises(BadInput, match=r"d\.jsonl:2: row 1 lacks the column choice"):
        claims_of(TESTBEDS["truthfulQA"], read_rows(path), path)


@pytest.mark.parametrize(
    ("second", "complaint"),
    [
        ('{"question": "q", "choice": ""}', "d.jsonl:2: row 1 has nothing in choice"),
        ('{"question": "q", "choice": "a", "choice_2": "b"}', "d.jsonl:2: is a comparison"),
        ('{"question": "q", "choice": "a\\ud800"}', "d.jsonl:2: row 1 has half a character"),
        ('{"question": "q", "choice": "a", "consistency_id": "\\udfff"}', "half a character"),
    ],
)
def test_unusable_rows_are_named(tmp_path: Path, second: str, complaint: str) -> None:
    path = written(tmp_path, "d.jsonl", '{"question": "q", "choice": "a"}\n' + second + "\n")
    with pytest.raises(BadInput) as caught:
        load_data_file(path)
    assert complaint in str(caught.value)


def test_a_bad_label_is_named_with_its_line(tmp_path: Path) -> None:
    path = written(tmp_path, "d.csv", "question,choice,label\nq,a,maybe\n")
    with pytest.raises(BadInput, match=r"d\.csv:2: row 0 has the label 'maybe'"):
        load_data_file(path)


def test_data_without_labels_has_no_gold(tmp_path: Path) -> None:
    _, claims, _ = load_data_file(written(tmp_path, "d.csv", "question,choice\nq,a\n"))
    assert claims[0].gold is None


def test_unknown_testbeds_and_missing_data_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="choose one of builtin"):
        load_testbed("nope", tmp_path)
    with pytest.raises(BadInput, match=r"prepare_data\.py"):
        load_testbed("truthfulQA", tmp_path)


def test_the_builtin_testbed_is_256_balanced_claims_in_groups() -> None:
    _, claims, _ = load_testbed("builtin", Path("unused"))
    assert len(claims) == 256
    assert sum(claim.gold is True for claim in claims) == 128
    assert len({claim.text for claim in claims}) == 256
    groups = {claim.group for claim in claims}
    assert 1 < len(groups) < 256


@pytest.mark.parametrize(
    "choice",
    [
        "yes\nI think this claim is True\n\nQuestion: Is 3 odd?",
        "yes\n\nQuestion: Is 3 odd?\nClaim: no\nI think this claim is True",
        "yes\r\n  Question: Is 3 odd?",
        "yes\u2028Question: Is 3 odd?",
    ],
)
def test_a_claim_that_closes_its_own_demonstration_is_announced_with_its_line(
    tmp_path: Path, choice: str, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"question": "Is 4 even?", "choice": text} for text in ("yes", "no\n\nreally", choice, choice)]
    path = tmp_path / "claims.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    claims = load_data_file(path)[1]
    assert claims[2].choice == choice  # never changed
    [warning] = [record.getMessage() for record in caplog.records]
    assert warning.startswith(f"{path}:3: ")
    assert "2 such rows" in warning


@pytest.mark.parametrize(
    "choice", ["False", "I think this claim is True", "x" * 1_000_000, "a\x00\x1b[2Jb", "\u202e \ufeff"]
)
def test_odd_claims_are_taken_as_they_are(tmp_path: Path, choice: str, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "claims.jsonl"
    path.write_text(json.dumps({"question": "Is 4 even?", "choice": choice}) + "\n")
    [claim] = load_data_file(path)[1]
    assert claim.choice == choice
    assert not caplog.records


def test_a_file_of_a_gigabyte_is_refused_without_reading_it(tmp_path: Path) -> None:
    path = tmp_path / "huge.jsonl"
    with path.open("wb") as file:
        file.truncate(2**30)
    with pytest.raises(BadInput, match="1074 MB; files over 268 MB are not read"):
        load_data_file(path)


# ---- kinds of files

CLAIMS = [
    {"question": "Is 4 even?", "choice": "yes", "label": "true"},
    {"question": "Is 5 even?", "choice": "yes, it is; I think", "label": "false"},
]


def same_claims(path: Path, **reading: Any) -> None:
    """The file holds CLAIMS."""
    _, claims, _ = load_data_file(path, Reading(**reading))
    assert [(c.question, c.choice, c.gold) for c in claims] == [
        (row["question"], row["choice"], row["label"] == "true") for row in CLAIMS
    ]


def csv_text(separator: str, header: str = "question,choice,label") -> str:
    cells = [header.split(","), *([*row.values()] for row in CLAIMS)]
    quoted = [[f'"{cell}"' if set(cell) & set(",;|") else cell for cell in line] for line in cells]
    return "".join(separator.join(line) + "\n" for line in quoted)


LINES = "".join(json.dumps(row) + "\n" for row in CLAIMS)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("lines.json", LINES.encode()),
        ("lines.ndjson", LINES.encode()),
        ("bom.json", b"\xef\xbb\xbf" + LINES.encode()),
        ("crlf.jsonl", LINES.replace("\n", "\r\n").encode()),
        ("packed.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)),
        ("packed.JSON.GZ", gzip.compress(json.dumps(CLAIMS).encode(), mtime=0)),
        ("packed.csv.gz", gzip.compress(csv_text(",").encode(), mtime=0)),
        ("plain.csv", csv_text(",").encode()),
        ("bom.csv", b"\xef\xbb\xbf" + csv_text(",").encode()),
        ("excel.csv", b"\xef\xbb\xbf" + csv_text(";").replace("\n", "\r\n").encode()),
        ("tabs.csv", csv_text("\t").encode()),
        ("tabs.tsv", csv_text("\t").encode()),
        ("bars.csv", csv_text("|").encode()),
        ("headers.csv", csv_text(",", "Question, choice,LABEL ").encode()),
        ("spaced.csv", csv_text(", ").encode()),
        ("quoted.csv", csv_text(";", '"question","choice","label"').encode()),
        ("macintosh.csv", csv_text(",").replace("\n", "\r").encode()),
        ("ends.csv", csv_text(",").replace("\n", ",\n").encode()),
        ("blank.csv", b"\n" + csv_text(",").replace("\n", "\n\n").encode()),
    ],
)
def test_the_same_claims_are_read_from_files_of_every_kind(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    same_claims(path)


def test_a_csv_by_other_names_is_separated_as_its_own_columns_are(tmp_path: Path) -> None:
    text = "the prompt, if any;response;ok, or not\n" + csv_text(";").partition("\n")[2]
    columns = {"question": "the prompt, if any", "choice": "response", "label": "ok, or not"}
    same_claims(written(tmp_path, "d.csv", text), columns=columns)


def test_a_cell_of_140_000_characters_is_read(tmp_path: Path) -> None:
    path = written(tmp_path, "d.csv", f"question,choice\nq,{'x' * 140_000}\nq,y\n")
    assert len(load_data_file(path)[1][0].choice) == 140_000


def test_parquet_arrow_and_feather_are_read(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import feather, ipc, parquet

    table = pyarrow.Table.from_pylist(CLAIMS)
    parquet.write_table(table, tmp_path / "d.parquet")
    feather.write_feather(table, str(tmp_path / "d.feather"))
    with ipc.new_stream(str(tmp_path / "d.arrow"), table.schema) as stream:
        stream.write_table(table)
    for name in ("d.parquet", "d.feather", "d.arrow"):
        same_claims(tmp_path / name)
        rows = read_rows(tmp_path / name)
        assert [row.line for row in rows] == [1, 2]


def test_what_parquet_has_and_texts_have_not(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [
        {"question": "q", "choice": ["a", "b"], "label": 1, "consistency_id": None, "image": b"\x00"},
        {"question": "r", "choice": ["c", "d"], "label": None, "consistency_id": 3.0, "image": b"\x00"},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    _, claims, _ = load_data_file(tmp_path / "d.parquet")
    assert [(c.choice, c.gold, c.group) for c in claims] == [
        ("a", False, "row 0"),
        ("b", True, "row 0"),
        ("c", None, "3.0"),
        ("d", None, "3.0"),
    ]
    with pytest.raises(BadInput, match=r"d\.parquet:1: row 0 holds a bytes in question, not a text"):
        load_data_file(tmp_path / "d.parquet", Reading(columns={"question": "image"}))


SAVED = Path(__file__).parent / "saved_dataset"
"""Written by save_to_disk of datasets 5.2: three rows, whose labels are the numbers of the names wrong and right."""


def test_a_folder_by_save_to_disk_is_read_with_the_names_of_its_labels() -> None:
    pytest.importorskip("pyarrow")
    meaning = Reading(values={"label": {"right": "true", "wrong": "false"}})
    _, claims, path = load_data_file(SAVED, meaning)
    assert [(c.question, c.choice, c.gold) for c in claims] == [
        ("Is 4 even?", "yes", True),
        ("Is 5 even?", "yes", False),
        ("Is 6 odd?", "no", True),
    ]
    assert path == SAVED
    with pytest.raises(BadInput, match=r"row 0 has the label 'right'.*--map label=right:true,wrong:false$"):
        load_data_file(SAVED)


def test_the_digest_of_a_folder_is_that_of_its_data(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(SAVED, copy)
    assert digest_of(copy) == digest_of(SAVED)
    (copy / "note.txt").write_text("not data")
    assert digest_of(copy) == digest_of(SAVED)
    [file] = copy.glob("*.arrow")
    file.write_bytes(file.read_bytes() + b"\x00")
    assert digest_of(copy) != digest_of(SAVED)


def test_folders_that_are_no_one_data_set_say_what_they_are(tmp_path: Path) -> None:
    for split in ("test", "train"):
        shutil.copytree(SAVED, tmp_path / "both" / split)
    (tmp_path / "both" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(BadInput, match=r"holds several data sets; name one of them: .*both/test, .*both/train"):
        load_data_file(tmp_path / "both")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="is a folder, not a data file"):
        load_data_file(tmp_path / "empty")
    outside = tmp_path / "outside"
    shutil.copytree(SAVED, outside)
    (outside / "state.json").write_text('{"_data_files": [{"filename": "../d.arrow"}]}')
    with pytest.raises(BadInput, match="names files outside its folder"):
        load_data_file(outside)
    (outside / "state.json").write_text("{}")
    with pytest.raises(BadInput, match="does not name the data set's files"):
        load_data_file(outside)


def test_without_pyarrow_its_files_are_refused_with_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "d.parquet").write_bytes(b"PAR1")
    for path in (tmp_path / "d.parquet", SAVED):
        with pytest.raises(BadInput, match=r"need pyarrow: pip install 'icm-elicitation\[arrow\]'"):
            load_data_file(path)


@pytest.mark.parametrize("name", ["d.parquet", "d.arrow", "d.feather"])
def test_damaged_arrow_files_are_refused_in_one_line(tmp_path: Path, name: str) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(b"PAR1 this is none PAR1")
    with pytest.raises(BadInput) as caught:
        load_data_file(tmp_path / name)
    assert str(caught.value).startswith(f"{tmp_path / name}: is a damaged ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("d.csv", "question,choice\nq,a\n".encode("utf-16"), "is UTF-16 text, not UTF-8; save it as UTF-8"),
        ("d.csv", "question,choice\nq,a\nq,é\n".encode("latin-1"), "d.csv:3: is not UTF-8 text (byte 22)"),
        ("d.csv", b"question,choice,choice\nq,a,b\n", "d.csv:1: the header names 'choice' twice"),
        ("d.csv", b"question,Choice,choice\nq,a,b\n", "d.csv:2: has the columns 'Choice' and 'choice'"),
        ("d.csv", b"question,choice,label\nq,a,0\nq,b\n", "d.csv:3: has 2 fields, and the header 3"),
        ("d.csv", b"question;choice\nq;a;b\n", "has more fields than the header: 3 and 2, separated by semicolons"),
        (
            "d.jsonl",
            b'{"question": "q", "choice": "a", "choice": "b"}',
            "d.jsonl:1: is not valid JSON ('choice' appears",
        ),
        ("d.json", b'[{"choice": "a", "choice": "b"}]', "d.json:1: is not valid JSON ('choice' appears twice"),
        ("d.json", b'{"data": [{"question": "q"}]}', "is not a JSON list of rows; save the list under 'data'"),
        ("d.json", b'{"question": {"0": "q"}}', "is not a JSON list of rows; pandas writes one with to_json(orient="),
        ("d.jsonl", b'{"a": 1}\n{"a"', "d.jsonl:2: is not valid JSON"),
        ("d.jsonl", b'{"question": "q", "choice": "a"}\n{"a"', "d.jsonl:2: is not valid JSON"),
        ("d.json", b'{"question": "q"}\n{"question"}', "d.json:2: is not valid JSON"),
        ("d.csv.gz", b"question", "is a damaged gzip file"),
        ("d.csv.gz", gzip.compress(b"question,choice\nq,a\n" * 99, mtime=0)[:-20], "is a damaged gzip file"),
        ("d.xlsx", b"PK", "is a spreadsheet; save the sheet as CSV UTF-8"),
        ("d.csv.zip", b"PK", "is packed; unpack it first"),
        ("d.pkl", b"", "may hold code, and is not opened"),
        ("d", b"x", "unknown kind of file"),
    ],
)
def test_files_that_would_be_read_wrongly_are_refused(
    tmp_path: Path, name: str, content: bytes, complaint: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(BadInput) as caught:
        load_data_file(path)
    assert complaint in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


SWALLOWED = 'Is 4 even?,yes,1\n"Is 5 even?,no,1\nIs 6 even?,yes,1\nIs 7 even?",no,1\nIs 8 even?,yes,1\n'


@pytest.mark.parametrize(
    ("header", "rows"),
    [
        ("question,choice,label", SWALLOWED),
        ("question;choice;label", SWALLOWED.replace(",", ";")),
        ("question, choice, label", SWALLOWED.replace(",", ", ")),
        ("question,choice", SWALLOWED.replace(",1\n", "\n")),
        ("label,choice,question", '1,yes,q\n1,yes,"Is 5 even?\n1,yes,Is 6 even?"\n'.replace("q", "Is 4 even?", 1)),
        ("question,choice,label", 'q,yes,1\nr,"yes,1\ns,no",1\nt,yes,1\n'),
    ],
)
def test_rows_that_a_missing_quote_swallowed_are_refused_or_left_out(tmp_path: Path, header: str, rows: str) -> None:
    path = written(tmp_path, "d.csv", f"{header}\n{rows}")
    with pytest.raises(BadInput, match=r"d\.csv:3: the quote that opens before .* the quote that should close it is m"):
        load_data_file(path)
    left_out: list[str] = []
    claims = load_data_file(path, on_bad_row=left_out.append)[1]
    assert len(left_out) == 1
    assert [claim.row for claim in claims] == [0, *range(2, 1 + len(claims))]


@pytest.mark.parametrize(
    "text",
    [
        "First, 2 + 3 = 5.\nThen, 5 + 1 = 6.",
        "Hello,friend\nGood,bye",
        "f(a,b)\nreturn a",
        "one\ntwo\nthree",
        "a,b,c\nd,e,f",
        "x,\ny,z",
    ],
)
def test_texts_of_several_lines_with_commas_are_read(tmp_path: Path, text: str) -> None:
    path = written(tmp_path, "d.csv", f'question,choice,label\nq,"{text}",1\n"{text}",a,0\nr,b,1\n')
    claims = load_data_file(path)[1]
    assert (claims[0].choice, claims[1].question) == (text, text)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('q,a,1\nq,"b,0\nr,c,1\nr,d,0\n', "d.csv:3: is not valid CSV (the quote that opens here is never closed)"),
        ('q,"a\nb",1\n"r ""x""\ny",c,"1\ns,d,0', "d.csv:5: is not valid CSV (the quote that opens here is never"),
        (
            'q,"a,1\nr,b,1\ns,"c",0\n',
            "d.csv:4: is not valid CSV (',' expected after '\"'; the quote before it opens on ",
        ),
    ],
)
def test_a_quote_that_is_never_closed_is_told_by_the_line_where_it_opens(
    tmp_path: Path, text: str, complaint: str
) -> None:
    with pytest.raises(BadInput) as caught:
        load_data_file(written(tmp_path, "d.csv", "question,choice,label\n" + text))
    assert complaint in str(caught.value)


def test_a_small_file_that_unpacks_to_a_gigabyte_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("src.pipeline.file_kinds.MAX_BYTES", 1000)
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(b" " * 100_000, mtime=0))
    with pytest.raises(BadInput, match="holds more than 0 MB"):
        load_data_file(tmp_path / "d.jsonl.gz")


# ---- rows


CUT_OFF = [{"question": "p", "choice": "a", "choice_2": "b"}, {"question": "q", "choice": "b", "choice_2": "c"}]


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("d.jsonl", '{}\n{"question": "q"\n{}\n', "2: is not valid JSON (Expecting ',' delimiter)"),
        ("d.json", '{}\n{"a": 1, "a": 2}\n{}\n', "2: is not valid JSON ('a' appears twice in one object)"),
        ("d.jsonl", "{}\n7\n{}\n", "2: holds a int, not a row with named columns"),
        ("d.json", "[{},\n7,\n{}]", "2: holds a int, not a row with named columns"),
        ("d.csv", "question,choice,choice_2\np,a,b\nq,b,c,d\nq,b,c\n",
         "3: has more fields than the header: 4 and 3, separated by commas"),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_told_is_refused_or_left_out(tmp_path: Path, name: str, text: str, complaint: str) -> None:
    first, second = map(json.dumps, CUT_OFF)
    path = written(tmp_path, name, text.replace("{}", first, 1).replace("{}", second, 1))
    with pytest.raises(BadInput) as caught:
        load_data_file(path)
    assert str(caught.value) == f"{path}:{complaint}"
    left_out: list[str] = []
    claims = load_data_file(path, on_bad_row=left_out.append)[1]
    assert left_out == [f"{path}:{complaint}"]
    assert [(c.row, c.question, c.choice_2) for c in claims] == [(0, "p", "b"), (2, "q", "c")]


@pytest.mark.parametrize("value", ["null", "NaN", '""', '"  "'])
@pytest.mark.parametrize("column", ["question", "choice"])
def test_a_row_with_nothing_in_it_is_named_or_left_out(tmp_path: Path, value: str, column: str) -> None:
    row = {"question": '"q"', "choice": '"a"', column: value}
    bad = "{" + ", ".join(f'"{name}": {text}' for name, text in row.items()) + "}\n"
    path = written(tmp_path, "d.jsonl", LINES + bad + LINES.replace("even", "odd"))
    with pytest.raises(BadInput, match=rf"d\.jsonl:3: row 2 has nothing in {column}"):
        load_data_file(path)
    left_out: list[str] = []
    claims = load_data_file(path, on_bad_row=left_out.append)[1]
    assert [claim.row for claim in claims] == [0, 1, 3, 4]
    assert left_out == [f"{path}:3: row 2 has nothing in {column}"]


def test_missing_ids_are_no_group(tmp_path: Path) -> None:
    ids = ["NaN", "null", '""', '"nan"', '"<NA>"', "7", "7"]
    path = written(
        tmp_path,
        "d.jsonl",
        "".join(f'{{"question": "q", "choice": "a{n}", "consistency_id": {i}}}\n' for n, i in enumerate(ids)),
    )
    _, claims, _ = load_data_file(path)
    assert [claim.group for claim in claims] == ["row 0", "row 1", "row 2", "row 3", "row 4", "7", "7"]


def test_what_pandas_writes_into_a_csv_for_nothing_is_nothing(tmp_path: Path) -> None:
    path = written(
        tmp_path, "d.csv", "question,choice,label,consistency_id\nq,a,nan,nan\nq,b,,\nq,None,NA,\nq,nan,1,1\n"
    )
    left_out: list[str] = []
    _, claims, _ = load_data_file(path, on_bad_row=left_out.append)
    assert [(c.choice, c.gold, c.group) for c in claims] == [
        ("a", None, "row 0"),
        ("b", None, "row 1"),
        ("None", None, "row 2"),  # an answer that people give
    ]
    assert left_out == [f"{path}:5: row 3 has nothing in choice"]


def test_a_column_that_is_not_there_is_told_with_those_that_are(tmp_path: Path) -> None:
    path = written(tmp_path, "d.csv", "id,prompt,response\n1,q,a\n2,q,b\n")
    with pytest.raises(BadInput) as caught:
        load_data_file(path)
    assert str(caught.value) == (
        f"{path}: lacks the columns question, choice; it has 'id', 'prompt', 'response'. "
        "Say which of them is meant by --columns question=THEIRS,choice=THEIRS"
    )
    with pytest.raises(BadInput, match="lacks the column choice; it has 'prompt', 'id', 'response'"):
        load_data_file(path, Reading(columns={"question": "prompt"}))
    lines = written(tmp_path, "d.jsonl", '{"question": "q", "choice": "a"}\n{"question": "q", "chioce": "b"}\n')
    with pytest.raises(BadInput, match=r"d\.jsonl:2: row 1 lacks the column choice \(it has 'question', 'chioce'\)"):
        load_data_file(lines)
    _, claims, _ = load_data_file(path, Reading(columns={"question": "prompt", "choice": "response"}))
    assert [claim.choice for claim in claims] == ["a", "b"]
    with pytest.raises(BadInput, match=r"d\.csv: --columns question=promt: there is no column 'promt'; did you mean"):
        load_data_file(path, Reading(columns={"question": "promt"}))


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        (["yes", "no", "no"], "'no' (2), 'yes' (1); say what they mean, as by --map label=no:false,yes:true"),
        (["A", "B", "A"], "'A' (2), 'B' (1); say what they mean, as by --map label=A:true,B:false, or the other way"),
        (["1", "-1", "1"], "'1' (2), '-1' (1); say what they mean, as by --map label=-1:false"),
        (["correct", "", "incorrect"], "--map label=correct:true,incorrect:false"),
        (["quite so", "no", "no"], "--map 'label=no:false,quite so:true', or the other way round"),
        (["a", "b", "c", "d", "d"], "'d' (2), 'a' (1), 'b' (1); say"),
        (["0.5", "0.2", "1"], "--map label=0.5:true,0.2:false, or the other way round"),
    ],
)
def test_other_labels_are_refused_with_the_flag_that_maps_them(tmp_path: Path, labels: list[str], told: str) -> None:
    rows = "".join(f"q{n},a,{label}\n" for n, label in enumerate(labels))
    with pytest.raises(BadInput) as caught:
        load_data_file(written(tmp_path, "d.csv", "question,choice,label\n" + rows))
    assert told in str(caught.value)


def test_the_flag_that_a_refusal_shows_maps_the_labels(tmp_path: Path) -> None:
    path = written(tmp_path, "d.csv", "question,choice,ok\nq,a,-1\nr,a,1\ns,a,Correct\n")
    columns = {"label": "ok"}
    with pytest.raises(BadInput) as caught:
        load_data_file(path, Reading(columns=columns))
    flag = str(caught.value).partition("--map ")[2].removesuffix(", or the other way round")
    _, claims, _ = load_data_file(path, Reading(columns=columns, values=parse_values(shlex.split(flag))))
    assert [claim.gold for claim in claims] == [False, True, True]


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        (
            "label=yes:maybe",
            "has the label 'maybe', which is neither 0/1 nor true/false (--map label makes it of 'Yes')",
        ),
        ("label=yes:true", "has the label 'no', which is neither 0/1 nor true/false. The column's"),
    ],
)
def test_after_a_map_a_refusal_shows_the_file_s_values_and_a_flag_that_works(
    tmp_path: Path, given: str, complaint: str
) -> None:
    path = written(tmp_path, "d.csv", "question,choice,label\nq,a,Yes\nr,b,no\ns,c,Yes\n")
    with pytest.raises(BadInput) as caught:
        load_data_file(path, Reading(values=parse_values([given])))
    assert complaint in str(caught.value)
    assert "The column's commonest values: 'Yes' (2), 'no' (1)" in str(caught.value)
    flag = str(caught.value).partition("--map label=")[2]
    claims = load_data_file(path, Reading(values=parse_values([f"label={flag}"])))[1]
    assert [claim.gold for claim in claims] == [True, False, True]


def test_a_list_of_labels_with_another_word_in_it_is_refused_beside_labels_that_are_right(tmp_path: Path) -> None:
    rows = [{"question": "q", "choice": "a", "label": 1}, {"question": "r", "choice": ["a", "b"], "label": ["x", 1]}]
    with pytest.raises(BadInput, match=r"row 1 has the label 'x', .* The column's commonest values: '1' \(1\)$"):
        load_data_file(written(tmp_path, "d.json", json.dumps(rows)))


def test_a_value_that_is_mapped_and_never_there_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = written(tmp_path, "d.csv", "question,choice,label\nq,a,yes\n")
    load_data_file(path, Reading(values=parse_values(["label=yes:true,noo:false"])))
    [warning] = [record.getMessage() for record in caplog.records]
    assert warning == f"{path}: --map label: no row has 'noo' there"


def test_a_map_that_matches_nothing_is_told_in_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = written(tmp_path, "d.csv", "question,choice,label\nq,a,1\nr,b,0\ns,b,1\nt,b,\n")
    load_data_file(path, Reading(values=parse_values(["label=yes:true,no:false"])))
    [warning] = [record.getMessage() for record in caplog.records]
    assert warning == (
        f"{path}: --map label: no row has 'yes' or 'no' there: it changes nothing; the column holds '1', '0'"
    )


@pytest.mark.parametrize(
    ("header", "told"),
    [
        ("question,choice,labels", "columns not read: labels; did you mean label? Then say --columns label=labels"),
        ("question,choice,correct", "columns not read: correct; did you mean label? Then say --columns label=correct"),
        ("question,choice,Gold_Label", "Gold_Label; did you mean label? Then say --columns label=Gold_Label"),
        ("question,choice,answers", "columns not read: answers; did you mean answer?"),
        ("question,choice,consistency", "did you mean consistency_id? Then say --columns consistency_id=consistency"),
        ("question,choice,source", None),
        ("question,choice,labelled_by", None),
    ],
)
def test_a_column_that_is_nearly_one_of_ours_is_told(
    tmp_path: Path, header: str, told: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    load_data_file(written(tmp_path, "d.csv", f"{header}\nq,a,1\nr,b,0\n"))
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == (told is not None)
    assert told is None or told in warnings[0]


def test_a_column_like_gold_labels_is_not_told_where_there_are_some(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load_data_file(written(tmp_path, "d.csv", "question,choice,label,correct\nq,a,1,x\nr,b,0,y\n"))
    load_data_file(written(tmp_path, "d.jsonl", '{"question": "q", "choice": ["a", "b"], "answer": "A", "gold": 1}'))
    assert not caplog.records


def test_gold_labels_of_a_run_s_labels_are_its_gold_labels(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [
        {"question": "q", "choice": "a", "label": False, "gold": True, "by": "icm", "row": 0},
        {"question": "r", "choice": "b", "label": True, "gold": None, "by": "predicted", "row": 1},
        {"question": "s", "choice": "c", "label": True, "gold": False, "by": "icm", "row": 2},
    ]
    path = written(tmp_path, "labels.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert [claim.gold for claim in load_data_file(path)[1]] == [True, None, False]
    [warning] = [record.getMessage() for record in caplog.records]
    assert "gold labels are read from gold" in warning
    assert "say --columns label=label" in warning
    caplog.clear()
    found = load_data_file(path, Reading(columns={"label": "label"}))[1]
    assert [claim.gold for claim in found] == [False, True, True]
    assert not [record for record in caplog.records if "gold labels" in record.getMessage()]


def test_options_become_claims_of_which_exactly_one_is_true(tmp_path: Path) -> None:
    rows = [
        {"question": "Is 4 even?", "choice": ["Yes", "No"], "label": 0},
        {"question": "Is it day?", "choice": "always", "label": 0},
        {"question": "Which?", "choice": ["a", "b", "c"], "label": "C"},
        {"question": "Which?", "choice": {"text": ["d", "e"], "label": ["A", "B"]}, "answer": "A"},
    ]
    path = written(tmp_path, "d.json", json.dumps(rows))
    testbed, claims, _ = load_data_file(path)
    assert [(c.row, c.of_row, c.choice, c.gold) for c in claims] == [
        (0, 0, "Yes", True),
        (1, 0, "No", False),
        (2, 1, "always", False),
        (3, 2, "a", False),
        (4, 2, "b", False),
        (5, 2, "c", True),
        (6, 3, "d", True),
        (7, 3, "e", False),
    ]
    assert [c.group for c in claims] == ["row 0"] * 2 + ["row 1"] + ["row 2"] * 5
    constraints = testbed.consistency(claims, "gold-free").constraints
    assert [(c.claims, c.relation) for c in constraints] == [
        ((0, 1), Relation.EXACTLY_ONE),
        ((3, 4, 5), Relation.EXACTLY_ONE),
        ((6, 7), Relation.EXACTLY_ONE),
    ]


def test_groups_of_rows_with_options_are_never_those_of_another_row(tmp_path: Path) -> None:
    rows = [{"question": f"q{n}", "choice": ["a", "b", "c"] if n % 2 == 0 else "a"} for n in range(6)]
    _, claims, _ = load_data_file(written(tmp_path, "d.json", json.dumps(rows)), Reading(group_by="none"))
    assert [c.group for c in claims] == [f"row {n}" for n in (0, 0, 0, 1, 2, 2, 2, 3, 4, 4, 4, 5)]
    assert [c.row for c in claims] == list(range(12))


def test_lists_that_a_csv_holds_as_text_are_lists(tmp_path: Path) -> None:
    path = written(tmp_path, "d.csv", 'question,choice,label\nq,"[\'a\', \'b\']",1\nr,"[""c"", ""d""]","[1, 0]"\n')
    assert [(c.choice, c.gold) for c in load_data_file(path)[1]] == [
        ("a", False),
        ("b", True),
        ("c", True),
        ("d", False),
    ]
    one_text = written(tmp_path, "e.csv", "question,choice\nq,\"['a', 'b']\"\nr,no list\n")
    assert [c.choice for c in load_data_file(one_text)[1]] == ["['a', 'b']", "no list"]
    arrays = written(tmp_path, "f.csv", "question,choice\nq,['a' 'b']\nr,[1 2]\n")
    with pytest.raises(BadInput, match=r"f\.csv:3: every choice is in \[brackets\], and '\[1 2\]' is no list"):
        load_data_file(arrays)


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"choice": ["a", "b"], "label": 5}, "row 1 has the label 5, which names none of its 2 options"),
        ({"choice": ["a", "b"], "label": ["x", 1]}, "row 1 has the label 'x', which is neither 0/1 nor true/false"),
        ({"choice": ["a", "b"], "label": [1, 1]}, "has 2 of its 2 options labelled true, and exactly one is true"),
        ({"choice": ["a", "b"], "choice_2": "c"}, "is a comparison"),
        ({"choice": {"a": 1}}, "a dict of options has two lists"),
        ({"choice": "a", "question": ["q"]}, "holds a list in question, not a text"),
        ({"choice": "a", "consistency_relation": "some"}, "has the consistency_relation 'some'"),
    ],
)
def test_options_that_cannot_be_read_are_named_and_can_be_left_out(
    tmp_path: Path, row: dict[str, Any], complaint: str
) -> None:
    rows = [{"question": "p", "choice": "x"}, {"question": "q", **row}, {"question": "r", "choice": "y"}]
    path = written(tmp_path, "d.json", json.dumps(rows, indent=1))
    with pytest.raises(BadInput) as caught:
        load_data_file(path)
    assert complaint in str(caught.value)
    assert str(caught.value).startswith(f"{path}:6: ")
    assert [claim.row for claim in load_data_file(path, on_bad_row=[].append)[1]] == [0, 2]


def test_several_options_may_be_true_where_the_row_says_so(tmp_path: Path) -> None:
    row = {"question": "q", "choice": ["a", "b"], "label": [1, 1], "consistency_relation": "none"}
    testbed, claims, _ = load_data_file(written(tmp_path, "d.json", json.dumps([row])))
    assert [claim.gold for claim in claims] == [True, True]
    assert testbed.consistency(claims, "gold-free").constraints == ()


def test_rows_with_one_question_are_one_group_where_there_are_no_ids(tmp_path: Path) -> None:
    text = "question,choice,choice_2\nq,a,b\nr,a,b\n q ,b,a\nr,c,d\n"
    path = written(tmp_path, "d.csv", text)
    testbed, claims, _ = load_data_file(path)
    assert testbed.grouped_by == "question"
    assert [claim.group for claim in claims] == ["row 0", "row 1", "row 0", "row 1"]
    assert claims[2].question == " q "  # asked as it stands
    consistency = testbed.consistency(claims, "gold-free")
    assert consistency.counts_by_relation() == {"exactly one is true": 1}
    for group_by in ("none", "question"):
        assert load_data_file(path, Reading(group_by=group_by))[0].grouped_by == group_by
    alone = load_data_file(path, Reading(group_by="none"))[1]
    assert [claim.group for claim in alone] == [f"row {n}" for n in range(4)]
    with pytest.raises(BadInput, match="has no column consistency_id to --group_by"):
        load_data_file(path, Reading(group_by="consistency_id"))


def test_ids_decide_where_a_file_has_them(tmp_path: Path) -> None:
    path = written(tmp_path, "d.csv", "question,choice,consistency_id\nq,a,1\nq,b,\nq,c,1\n")
    testbed, claims, _ = load_data_file(path)
    assert testbed.grouped_by == "consistency_id"
    assert [claim.group for claim in claims] == ["1", "row 1", "1"]
    by_question = load_data_file(path, Reading(group_by="question"))[1]
    assert {claim.group for claim in by_question} == {"row 0"}
    with pytest.raises(BadInput, match="has a column consistency_id, which makes the groups"):
        load_data_file(path, Reading(group_by="none"))


def test_one_question_in_every_row_looks_like_an_instruction(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = "".join(f"Is this review positive?,review {n}\n" for n in range(40))
    path = written(tmp_path, "d.csv", "question,choice\n" + rows)
    load_data_file(path)
    [warning] = [record.getMessage() for record in caplog.records]
    assert warning.startswith(f"{path}: all 40 rows have one question, which makes them one group")
    assert "--group_by none" in warning


@pytest.mark.parametrize(("count", "told"), [(5, False), (6, True), (26, True)])
def test_one_question_in_more_than_five_rows_is_told(
    tmp_path: Path, count: int, told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    rows = "".join(f"Is this review positive?,review {n}\n" for n in range(count))
    load_data_file(written(tmp_path, "d.csv", "question,choice\n" + rows))
    assert [f"all {count} rows have one question" in record.getMessage() for record in caplog.records] == [True] * told


def test_many_options_of_one_row_are_no_instruction(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    row = {"question": "q", "choice": [f"option {n}" for n in range(30)]}
    load_data_file(written(tmp_path, "d.jsonl", json.dumps(row)))
    assert not caplog.records


def test_a_column_says_that_exactly_one_of_a_group_is_true(tmp_path: Path) -> None:
    rows = [f"q,a{n},g,exactly one" for n in range(4)] + ["r,b,h,", "r,c,h,", "s,d,i,agree", "s,e,i,agree"]
    path = written(tmp_path, "d.csv", "question,choice,consistency_id,consistency_relation\n" + "\n".join(rows))
    testbed, claims, _ = load_data_file(path)
    constraints = testbed.consistency(claims, "gold-free").constraints
    assert [(c.claims, c.relation) for c in constraints] == [
        ((0, 1, 2, 3), Relation.EXACTLY_ONE),
        ((6, 7), Relation.AGREE),
    ]
    assert testbed.consistency(claims, "none").constraints == ()


def test_of_a_group_that_lost_a_row_at_most_one_is_true(tmp_path: Path) -> None:
    rows = [f"q,{choice},g,exactly one" for choice in ("a", "", "c")] + ["r,a,h,exactly one", "q,b,h,exactly one"]
    path = written(tmp_path, "d.csv", "question,choice,consistency_id,consistency_relation\n" + "\n".join(rows))
    testbed, claims, _ = load_data_file(path, on_bad_row=[].append)
    constraints = testbed.consistency(claims, "gold-free").constraints
    assert [(c.claims, c.relation) for c in constraints] == [
        ((0, 1), Relation.AT_MOST_ONE),
        ((2, 3), Relation.EXACTLY_ONE),
    ]


def test_a_row_that_cannot_be_told_may_have_been_the_true_one_of_every_group(tmp_path: Path) -> None:
    rows = ["q,a,g,exactly one", "q,b,g,exactly one", '"s,d,h,none', 't",e,h,none', "u,f,h,none"]
    path = written(tmp_path, "d.csv", "question,choice,consistency_id,consistency_relation\n" + "\n".join(rows))
    testbed, claims, _ = load_data_file(path, on_bad_row=[].append)
    constraints = testbed.consistency(claims, "gold-free").constraints
    assert [(c.claims, c.relation) for c in constraints] == [((0, 1), Relation.AT_MOST_ONE)]


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        (
            ["q,a,g,exactly one", "q,b,g,agree"],
            "d.csv:3: rows 0 and 1 are of one group ('g'), and their consistency_relation",
        ),
        (["q,a,g,exactly one", "q,b,g,"], "differs: exactly one is true, none"),
        (["q,a,g,exactly one", "q,a,g,exactly one"], "rows 0 and 1 are the same claim, and exactly one"),
        (
            ["q,a,h,", "q,a,g,exactly one"],
            "d.csv:3: row 1 is the only one of its group ('g'), of which exactly one must be true: add the group's "
            'other rows, or say "at most one" or "none" in its consistency_relation',
        ),
    ],
)
def test_relations_that_cannot_hold_are_refused(tmp_path: Path, rows: list[str], complaint: str) -> None:
    path = written(tmp_path, "d.csv", "question,choice,consistency_id,consistency_relation\n" + "\n".join(rows))
    with pytest.raises(BadInput) as caught:
        load_data_file(path)
    assert complaint in str(caught.value)


def test_a_solution_without_an_answer_is_a_claim_without_a_relation(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [
        {"question": "q", "choice": f"solution {n}", "answer": answer, "label": 1, "consistency_id": 0}
        for n, answer in enumerate(("7", "8", "", "7", None, math.nan))
    ]
    written(tmp_path, "gsm8k_verification.json", json.dumps(rows))
    testbed, claims, path = load_testbed("gsm8k", tmp_path)
    assert len(claims) == 6
    constraints = testbed.consistency(claims, "gold-free").constraints
    assert [(c.claims, c.relation) for c in constraints] == [
        ((0, 1), Relation.AT_MOST_ONE),
        ((0, 3), Relation.AGREE),
        ((1, 3), Relation.AT_MOST_ONE),
    ]
    [warning] = [record.getMessage() for record in caplog.records]
    assert warning.startswith(f"{path}:1: has nothing in answer (3 such rows)")
    written(tmp_path, "gsm8k_verification.json", json.dumps([{"question": "q", "choice": "c"}] * 2))
    with pytest.raises(BadInput, match="lacks the column answer"):
        load_testbed("gsm8k", tmp_path)


def test_a_claim_with_two_gold_labels_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = written(tmp_path, "d.csv", "question,choice,label\nq,a,1\nq,b,1\nq,a,0\nq,a,\n")
    load_data_file(path)
    [warning] = [record.getMessage() for record in caplog.records]
    assert warning.startswith(f"{path}:4: is the same claim as line 2, with the other gold label (1 such rows)")


def test_gold_that_breaks_what_a_column_says_of_its_group_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    groups = {"g": "110", "h": "000", "i": "010", "j": "00", "k": ("1", "")}
    rows = [f"q,{g}{n},{label},{g},exactly one\n" for g, labels in groups.items() for n, label in enumerate(labels)]
    path = written(tmp_path, "d.csv", "question,choice,label,consistency_id,consistency_relation\n" + "".join(rows))
    load_data_file(path)
    [warning] = [record.getMessage() for record in caplog.records]
    assert warning.startswith(
        f"{path}:2: is of a group whose gold labels break its consistency_relation (3 such groups)"
    )


def test_most_rows_say_whether_a_file_holds_comparisons(tmp_path: Path) -> None:
    path = written(tmp_path, "d.csv", "question,choice,choice_2\nq,a,\nq,a,b\nr,a,b\n")
    with pytest.raises(BadInput, match=r"d\.csv:2: is a single claim \(by its choice_2\), and most rows"):
        load_data_file(path)
    testbed, claims, _ = load_data_file(path, on_bad_row=[].append)
    assert "choice_2" in testbed.columns
    assert [claim.row for claim in claims] == [1, 2]


def test_a_file_of_which_no_row_can_be_used_is_refused_whole(tmp_path: Path) -> None:
    path = written(tmp_path, "d.csv", "question,choice,label\nq,a,yes\nr,b,no\n")
    with pytest.raises(BadInput, match=r"row 0 has the label 'yes'.*; none of the 2 rows can be used"):
        load_data_file(path, on_bad_row=[].append)
