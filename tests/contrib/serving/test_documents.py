"""A folder of texts becomes passages, and BM25 finds them."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contrib.serving.documents import MAX_FILE_BYTES, WORDS, Library, _passages
from core.errors import ConfigurationError


def test_the_best_passage_stands_first(folder: Path) -> None:
    library = Library.read(folder)
    [(passage, score)] = library.search("Where does the Danube end?", 1)
    assert passage.path == "rivers/danube.txt"
    assert passage.line == 1
    assert score > 0
    assert library.search("honey", 5)[0][0].path == "bees.md"


def test_nothing_is_found_where_no_word_is_shared(folder: Path) -> None:
    library = Library.read(folder)
    assert library.search("quantum chromodynamics", 3) == []
    assert library.search("", 3) == []
    assert library.search("the of and", 3) == [], "stop words alone"


def test_a_folder_without_texts_finds_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("... !!! \n")
    assert Library.read(tmp_path).search("anything", 3) == []


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="--documents"):
        Library.read(tmp_path / "none")


def test_what_cannot_be_read_is_left_out_with_a_warning(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "outside.txt").write_text("a secret password")
    (folder / "link.txt").symlink_to(tmp_path / "outside.txt")
    (folder / "latin.txt").write_bytes("Müller password".encode("latin-1"))
    with (folder / "huge.txt").open("wb") as huge:
        huge.truncate(MAX_FILE_BYTES + 1)
    (folder / "image.png").write_bytes(b"password")
    with caplog.at_level(logging.WARNING):
        assert Library.read(folder).search("password", 3) == []
    assert [record.getMessage().split()[0] for record in caplog.records] == ["huge.txt", "latin.txt", "link.txt"]


def test_paragraphs_stay_whole_where_they_fit() -> None:
    first, second, third = ("one " * 70).strip(), ("two " * 70).strip(), ("three " * 20).strip()
    passages = list(_passages("x", f"{first}\n\n{second}\n\n{third}\n"))
    assert [(p.line, p.text) for p in passages] == [(1, first), (3, f"{second}\n\n{third}")]


@given(st.text(alphabet="ab \n", max_size=400), st.integers(1, 40))
def test_no_word_is_lost_and_lines_are_right(text: str, times: int) -> None:
    text = text * times
    passages = list(_passages("x", text))
    assert " ".join(p.text for p in passages).split() == text.split()
    lines = text.split("\n")
    for passage in passages:
        assert len(passage.text.split()) <= WORDS
        assert passage.text.split()[0] in lines[passage.line - 1].split()
