"""A folder of texts as passages, and BM25 over them (Robertson and Zaragoza 2009), by the bm25s library.

library = Library.read(Path("docs"))
for passage, score in library.search("how is a run resumed?", count=3): ...
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import bm25s

from core.errors import ConfigurationError

log = logging.getLogger(__name__)
logging.getLogger("bm25s").setLevel(logging.WARNING)  # it sets itself to DEBUG

SUFFIXES: Final = (".txt", ".md", ".rst")
MAX_FILE_BYTES: Final = 8 * 1024 * 1024
WORDS: Final = 120
"""A passage's length, words: whole paragraphs as long as they fit, so some 160 tokens."""


@dataclass(frozen=True, slots=True)
class Passage:
    """Some paragraphs of a file. path: relative to the folder, with slashes. line: its first one, 1-based."""

    path: str
    line: int
    text: str


class Library:
    """The passages of a folder and their index. Immutable, so that threads may share it."""

    def __init__(self, passages: list[Passage]) -> None:
        words = [_words(passage.text) for passage in passages]
        self.passages = tuple(passage for passage, found in zip(passages, words, strict=True) if found)
        self._index: Any = None
        if self.passages:
            self._index = bm25s.BM25()
            self._index.index([found for found in words if found], show_progress=False)

    @classmethod
    def read(cls, folder: Path) -> Library:
        """Every .txt, .md and .rst file below `folder`, in order of their names.

        Files that are no UTF-8 text, larger than MAX_FILE_BYTES, or links to a place outside are left out with a
        warning. Raises ConfigurationError where there is no such folder.
        """
        if not folder.is_dir():
            raise ConfigurationError(f"there is no folder of texts at {folder}.", hint="Name one with --documents.")
        root = folder.resolve()
        passages: list[Passage] = []
        for path in sorted(root.rglob("*")):
            if path.suffix.lower() not in SUFFIXES or not path.is_file():
                continue
            name = path.relative_to(root).as_posix()
            text = _read(path, root, name)
            if text is not None:
                passages += _passages(name, text)
        return cls(passages)

    def search(self, query: str, count: int) -> list[tuple[Passage, float]]:
        """The best passages that share a word with the query, at most `count`, each with its BM25 score."""
        words = _words(query)
        if not words or self._index is None:
            return []
        scores = self._index.get_scores(words)
        best = sorted(range(len(scores)), key=lambda at: (-scores[at], at))[:count]
        return [(self.passages[at], float(scores[at])) for at in best if scores[at] > 0]


def _words(text: str) -> list[str]:
    found: list[list[str]] = bm25s.tokenize([text], stopwords="en", return_ids=False, show_progress=False)
    return found[0]


def _read(path: Path, root: Path, name: str) -> str | None:
    if not path.resolve().is_relative_to(root):
        log.warning("%s is left out: it links to a place outside of the folder", name)
        return None
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            log.warning("%s is left out: larger than %d MB", name, MAX_FILE_BYTES // 2**20)
            return None
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        log.warning("%s is left out: %s", name, type(error).__name__)
        return None


def _passages(name: str, text: str) -> Iterator[Passage]:
    held: list[tuple[int, str]] = []
    count = 0

    def passage() -> Passage:
        return Passage(name, held[0][0], "\n".join(line for _, line in held).strip())

    for paragraph in _paragraphs(text):
        # A paragraph is kept whole where it can be, else cut between its lines.
        whole = sum(len(line.split()) for _, line in paragraph) <= WORDS
        for at, (number, line) in enumerate(paragraph):
            needed = paragraph[at:] if whole and at == 0 else [(number, line)]
            if held and count + sum(len(line.split()) for _, line in needed) > WORDS:
                yield passage()
                held, count = [], 0
            held.append((number, line))
            count += len(line.split())
        if held:
            held.append((held[-1][0], ""))
    if held:
        yield passage()


def _paragraphs(text: str) -> Iterator[list[tuple[int, str]]]:
    """The lines of each paragraph with their numbers; a line of more than WORDS words is cut into several."""
    lines: list[tuple[int, str]] = []
    for number, line in enumerate(text.split("\n"), start=1):
        words = line.split()
        if not words:
            if lines:
                yield lines
                lines = []
        elif len(words) <= WORDS:
            lines.append((number, line.strip()))
        else:
            lines += [(number, " ".join(words[at : at + WORDS])) for at in range(0, len(words), WORDS)]
    if lines:
        yield lines
