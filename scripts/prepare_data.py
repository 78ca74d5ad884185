#!/usr/bin/env python3
"""Fetch the public data sets and write them as the testbeds read them.

    python scripts/prepare_data.py                         # into data/
    python scripts/prepare_data.py --from ~/Downloads      # from files fetched by hand
    python scripts/prepare_data.py --verify                # do the fetched files still have their recorded SHA-256?
    python scripts/prepare_data.py --solutions FILE        # GSM8K: also the claims, from solutions you sampled

TruthfulQA (Apache-2.0) becomes train_truthfulqa.json, up to four answers a question, and truthfulqa_preference.json.
GSM8K's test questions (MIT) come with one correct solution each and no wrong ones, so there is nothing to tell apart in
them: gsm8k_verification.json needs sampled solutions, one JSON object a line with "question" and "solution" (the
question verbatim). Without them gsm8k_questions.jsonl is written, to sample from. Alpaca's comparisons have no public
home that this script knows; put your own into alpaca_preference.json (docs/installing.md has the columns).

Fetched files are kept in data/raw. No authority publishes their hashes, so none is built in: the first fetch records
them in data/SHA256SUMS, and later fetches and --verify compare. Exit code 2: something is missing, one line says what.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import re
import sys
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

REPO_ROOT: Final = Path(__file__).resolve().parents[1]
if str(REPO_ROOT) not in sys.path:  # run as a script, without an installed package
    sys.path.insert(0, str(REPO_ROOT))

from core.flags import FlagParser  # noqa: E402

SUMS: Final = "SHA256SUMS"
TIMEOUT: Final = 60.0
MAX_BYTES: Final = 32 * 1024 * 1024
GROUP: Final = 4
"""Answers a TruthfulQA question, as in the published testbed."""

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Source:
    """A file, and where it is published."""

    file: str
    url: str


TRUTHFULQA: Final = Source("TruthfulQA.csv", "https://raw.githubusercontent.com/sylinrl/TruthfulQA/main/TruthfulQA.csv")
GSM8K: Final = Source(
    "test.jsonl",
    "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data/test.jsonl",
)


class DataError(Exception):
    """A data set cannot be fetched or read; the message says what to do."""


# ---- TruthfulQA


def read_truthfulqa(text: str, name: str = TRUTHFULQA.file) -> list[tuple[str, list[str], list[str]]]:
    """(question, true answers, false answers) a row, the best ones first, duplicates dropped. Raises DataError."""
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    needed = {"Question", "Best Answer", "Correct Answers", "Incorrect Answers"}
    if missing := needed - set(reader.fieldnames or ()):
        raise DataError(f"{name}: has no column {sorted(missing)[0]!r}; is it TruthfulQA.csv?")
    questions = []
    try:
        for row in reader:
            true = _distinct([row["Best Answer"], *row["Correct Answers"].split(";")])
            # Newer versions of the file name the best incorrect answer too.
            false = _distinct([row.get("Best Incorrect Answer") or "", *row["Incorrect Answers"].split(";")])
            questions.append((row["Question"].strip(), true, [answer for answer in false if answer not in true]))
    except (csv.Error, AttributeError):
        raise DataError(f"{name}, line {reader.line_num}: not valid CSV with the columns of its first line") from None
    if not questions:
        raise DataError(f"{name}: holds no questions")
    return questions


def truthfulqa_claims(questions: Iterable[tuple[str, list[str], list[str]]]) -> list[Row]:
    """One row an answer. Two true and two false answers a question, more of one kind where the other is short.

    Questions without a true and a false answer are left out. A group's order comes from a hash, not from its labels.
    """
    rows: list[Row] = []
    for number, (question, true, false) in enumerate(questions):
        if not true or not false:
            continue
        take_true = max(GROUP // 2, GROUP - len(false))
        chosen = [(answer, 1) for answer in true[:take_true]]
        chosen += [(answer, 0) for answer in false[: GROUP - len(chosen)]]
        for answer, label in sorted(chosen, key=lambda pair: _shuffled(question, pair[0])):
            rows.append({"question": question, "choice": answer, "label": label, "consistency_id": number})
    return rows


def truthfulqa_comparisons(questions: Iterable[tuple[str, list[str], list[str]]]) -> list[Row]:
    """The best true against the best false answer, in both orders: two rows a question."""
    rows: list[Row] = []
    for number, (question, true, false) in enumerate(questions):
        if not true or not false:
            continue
        pair = sorted((true[0], false[0]), key=lambda answer: _shuffled(question, answer))
        for first, second in (pair, pair[::-1]):
            rows.append(
                {
                    "question": question,
                    "choice": first,
                    "choice_2": second,
                    "label": first == true[0],
                    "consistency_id": number,
                }
            )
    return rows


# ---- GSM8K


def read_gsm8k(text: str, name: str = GSM8K.file) -> list[Row]:
    """Rows of question, answer (the final number) and solution (the gold one). Raises DataError with the line."""
    rows = []
    for number, row in _json_lines(text, name):
        if not isinstance(row.get("question"), str) or "####" not in str(row.get("answer", "")):
            raise DataError(f"{name}, line {number}: expected a question, and an answer with '#### NUMBER'")
        solution, _, final = row["answer"].rpartition("####")
        plain = re.sub(r"<<.*?>>", "", solution).strip()  # the calculator's annotations
        rows.append({"question": row["question"].strip(), "answer": _number(final), "solution": plain})
    if not rows:
        raise DataError(f"{name}: holds no questions")
    return rows


def gsm8k_claims(questions: Sequence[Row], solutions_text: str, name: str) -> tuple[list[Row], int]:
    """One row a sampled solution whose final number can be read, and how many could not. Raises DataError."""
    known = {row["question"]: (number, row["answer"]) for number, row in enumerate(questions)}
    rows: list[Row] = []
    unread = 0
    for line, sample in _json_lines(solutions_text, name):
        question, solution = str(sample.get("question", "")).strip(), str(sample.get("solution", "")).strip()
        if question not in known or not solution:
            raise DataError(
                f"{name}, line {line}: expected a solution, and a question that GSM8K's test set has verbatim"
            )
        number, gold = known[question]
        answer = final_number(solution)
        if answer is None:
            unread += 1
            continue
        rows.append(
            {
                "question": question,
                "answer": answer,
                "label": answer == gold,
                "consistency_id": number,
                "choice": solution,
            }
        )
    return sorted(rows, key=lambda row: int(row["consistency_id"])), unread


def final_number(solution: str) -> str | None:
    """What follows the last '####' or 'answer is', else the last number; None where there is none."""
    marked = re.split(r"####|answer is:?", solution, flags=re.IGNORECASE)
    numbers = re.findall(r"-?\$?\d[\d,]*(?:\.\d+)?", marked[-1]) if len(marked) > 1 else []
    if numbers:
        return _number(numbers[0])
    numbers = re.findall(r"-?\$?\d[\d,]*(?:\.\d+)?", solution)
    return _number(numbers[-1]) if numbers else None


def _number(text: str) -> str:
    """One spelling a number: no blanks, dollar signs, thousands separators or empty decimals."""
    plain = re.sub(r"[\s,$]", "", text).rstrip(".")
    return re.sub(r"\.0+$", "", plain)


# ---- files


def fetch(source: Source) -> bytes:
    """The published file. Raises DataError naming where to get it by hand."""
    try:
        with urllib.request.urlopen(source.url, timeout=TIMEOUT) as answer:  # noqa: S310 - the URLs above
            content: bytes = answer.read(MAX_BYTES + 1)
    except (urllib.error.URLError, OSError) as error:
        reason = getattr(error, "reason", error)
        raise DataError(
            f"cannot fetch {source.url} ({reason}). Fetch it elsewhere and give its folder: --from FOLDER"
        ) from None
    if len(content) > MAX_BYTES:
        raise DataError(f"{source.url} is larger than {MAX_BYTES >> 20} MB; that is not the file expected")
    return content


def read_sums(path: Path) -> dict[str, str]:
    """SHA-256 by file name, from sha256sum's format. Empty where there is no such file."""
    if not path.is_file():
        return {}
    pairs = (line.split(maxsplit=1) for line in path.read_text().splitlines() if line.strip())
    return {name.lstrip("*"): digest for digest, name in pairs}


def record(folder: Path, name: str, content: bytes) -> None:
    """Keep a fetched file, and its hash where none is known. Raises DataError where it differs from the known one."""
    sums_path = folder / SUMS
    sums = read_sums(sums_path)
    digest, key = hashlib.sha256(content).hexdigest(), f"raw/{name}"
    if sums.get(key, digest) != digest:
        raise DataError(
            f"{name} has SHA-256 {digest}, but {sums[key]} was recorded at its first fetch. If it was changed on "
            f"purpose, delete its line in {sums_path}"
        )
    (folder / "raw").mkdir(parents=True, exist_ok=True)
    _write(folder / "raw" / name, content)
    lines = sorted({**sums, key: digest}.items())
    _write(sums_path, "".join(f"{value}  {name}\n" for name, value in lines).encode())


def verify(folder: Path) -> list[str]:
    """One line a recorded file that is missing or differs."""
    sums = read_sums(folder / SUMS)
    if not sums:
        raise DataError(f"{folder / SUMS}: nothing is recorded yet; fetch the data first")
    wrong = []
    for name, digest in sums.items():
        path = folder / name
        if not path.is_file():
            wrong.append(f"{path}: missing")
        elif hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            wrong.append(f"{path}: its SHA-256 is not the recorded one")
    return wrong


def load(source: Source, folder: Path, given: Path | None) -> str:
    """The text of a source: from `given` if it is there, else fetched; recorded in either case."""
    if given is not None:
        path = given / source.file
        if not path.is_file():
            raise DataError(f"{path}: not found. Fetch {source.url} into {given}")
        content = path.read_bytes()
    else:
        content = fetch(source)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"{source.file}: is not UTF-8 text") from None
    record(folder, source.file, content)
    return text


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """A JSON list, one row a line (or one object a line for .jsonl), written in one piece."""
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    text = "\n".join(lines) + "\n" if path.suffix == ".jsonl" else "[\n" + ",\n".join(lines) + "\n]\n"
    _write(path, text.encode())
    print(f"{path}: {len(rows)} rows")


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_bytes(content)
    temporary.replace(path)


def _json_lines(text: str, name: str) -> Iterator[tuple[int, Row]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict):
                raise DataError(f"{name}, line {number}: not a JSON object")
            yield number, row


def _distinct(answers: Iterable[str]) -> list[str]:
    """Stripped, ended with a full stop as the file's best answers are not always, without repeats, in order."""
    stripped = (answer.strip() for answer in answers)
    return list(dict.fromkeys(a if a.endswith((".", "!", "?", '"')) else f"{a}." for a in stripped if a))


def _shuffled(question: str, answer: str) -> str:
    return hashlib.sha256(f"{question}\0{answer}".encode()).hexdigest()


def prepare_truthfulqa(folder: Path, given: Path | None) -> None:
    """Write both TruthfulQA testbeds. Raises DataError."""
    questions = read_truthfulqa(load(TRUTHFULQA, folder, given))
    write_rows(folder / "train_truthfulqa.json", truthfulqa_claims(questions))
    write_rows(folder / "truthfulqa_preference.json", truthfulqa_comparisons(questions))


def prepare_gsm8k(folder: Path, given: Path | None, solutions: Path | None) -> None:
    """Write the GSM8K testbed if there are sampled solutions, else the questions to sample from. Raises DataError."""
    questions = read_gsm8k(load(GSM8K, folder, given))
    if solutions is None:
        write_rows(folder / "gsm8k_questions.jsonl", questions)
        print("  GSM8K has no wrong solutions to tell from right ones: sample some, then --solutions FILE")
        return
    try:
        text = solutions.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {solutions}: {error}") from None
    rows, unread = gsm8k_claims(questions, text, str(solutions))
    write_rows(folder / "gsm8k_verification.json", rows)
    if unread:
        print(f"  {unread} solutions without a final number were left out")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=REPO_ROOT / "data", help="where to write (default: data/)")
    parser.add_argument("--from", dest="given", type=Path, metavar="FOLDER", help="holds the files, fetched by hand")
    parser.add_argument("--only", choices=("truthfulqa", "gsm8k"), help="one data set instead of both")
    parser.add_argument(
        "--solutions", type=Path, metavar="FILE", help="sampled GSM8K solutions, one JSON object a line"
    )
    parser.add_argument("--verify", action="store_true", help="only compare the fetched files with their hashes")
    options = parser.parse_args(arguments)
    try:
        if options.verify:
            wrong = verify(options.dir)
            print("\n".join(wrong) if wrong else f"{options.dir}: all files have their recorded SHA-256")
            return 2 if wrong else 0
        options.dir.mkdir(parents=True, exist_ok=True)
        if options.only != "gsm8k":
            prepare_truthfulqa(options.dir, options.given)
        if options.only != "truthfulqa":
            prepare_gsm8k(options.dir, options.given, options.solutions)
    except DataError as error:
        print(f"prepare_data: {error}.", file=sys.stderr)
        return 2
    except OSError as error:  # --dir cannot be written, a file cannot be read
        print(f"prepare_data: {error.filename}: {error.strerror}.", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
