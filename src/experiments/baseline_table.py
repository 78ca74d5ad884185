"""The table of `icm baselines`: from the rows of finished seeds to JSON and to text. Asks no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import orjson
from pydantic import TypeAdapter, ValidationError

from core.files import write_atomically
from src.icm.label_names import confusion, names_of
from src.icm.objective import num_labels_of, wilson_interval
from src.icm.testbeds import BadInput
from src.pipeline.baselines import BASELINES
from src.pipeline.baselines.row_result import RowResult
from src.results.by_class import ByClass, Measure, measure_text, name_of_f1, over_seeds
from src.results.messages import calibration_in_words
from src.results.statistics import Difference, Judged, Share, paired_difference, share_right

FORMAT: Final = 1
AGAINST: Final = ("zero-shot", "many-shot-gold")
SETS: Final = ("pool", "test")
_ROW: Final = TypeAdapter(RowResult)
Results = Mapping[str, Mapping[int, RowResult]]


class TableFolder:
    """runs/NAME/ of a table: baselines.json, and seed-S/ with that seed's ICM run and rows/ROW.json."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.table_path = path / "baselines.json"

    def seed_path(self, seed: int) -> Path:
        """The ordinary run folder of this seed's search."""
        return self.path / f"seed-{seed}"

    def read_table(self) -> dict[str, Any] | None:
        """baselines.json; None where this table was never begun. Raises BadInput where it cannot be used."""
        try:
            document = orjson.loads(self.table_path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, orjson.JSONDecodeError):
            raise BadInput(
                f"{self.table_path}: cannot be read; move {self.path} away, or choose another --run"
            ) from None
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise BadInput(f"{self.table_path}: was written by another version; choose another --run")
        return document

    def write_table(self, document: Mapping[str, Any]) -> None:
        """Replace baselines.json."""
        content = {"format": FORMAT, "kind": "baselines", **document}
        write_atomically(self.table_path, orjson.dumps(content, option=orjson.OPT_INDENT_2 | orjson.OPT_NON_STR_KEYS))

    def read_row(self, row: str, seed: int) -> RowResult | None:
        """A finished row of one seed; None where it is not there."""
        path = self._row_path(row, seed)
        try:
            return _ROW.validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValidationError):
            raise BadInput(f"{path}: is damaged; remove it, and the same command makes it again") from None

    def write_row(self, result: RowResult, seed: int) -> None:
        """Write a finished row."""
        path = self._row_path(result.row, seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, orjson.dumps(result))

    def read_results(self, rows: Sequence[str], seeds: Sequence[int]) -> dict[str, dict[int, RowResult]]:
        """Every finished row by name and seed."""
        found: dict[str, dict[int, RowResult]] = {}
        for row in rows:
            of_row = {seed: result for seed in seeds if (result := self.read_row(row, seed)) is not None}
            if of_row:
                found[row] = of_row
        return found

    def _row_path(self, row: str, seed: int) -> Path:
        return self.seed_path(seed) / "rows" / f"{row}.json"


def row_documents(results: Results) -> list[dict[str, Any]]:
    """One entry a row: shares with intervals on both sets of claims, differences to AGAINST, U, and cost."""
    judged = {name: {row: _judged(of_row, name) for row, of_row in results.items()} for name in SETS}
    documents = []
    for row, of_row in results.items():
        document: dict[str, Any] = {"row": row, "title": BASELINES[row].title, "seeds": sorted(of_row)}
        for name in SETS:
            share = share_right(judged[name][row])
            document[name] = (
                None
                if share is None
                else _share_document(share)
                | _class_document(_by_class(of_row, name, share.claims))
                | {
                    "versus": {
                        other: _difference_document(difference)
                        for other in AGAINST
                        if other != row
                        and other in results
                        and (difference := paired_difference(judged[name][row], judged[name][other])) is not None
                    }
                }
            )
        utilities = [of_row[seed].utility for seed in sorted(of_row)]
        if None not in utilities:
            document["U"] = utilities
        costs = [result.cost for result in of_row.values()]
        document["cost"] = {
            key: round(sum(getattr(cost, key) for cost in costs), 3)
            for key in ("seconds", "asked", "prompt_tokens", "cached_tokens", "requests")
        }
        documents.append(document)
    return documents


def table_text(document: Mapping[str, Any]) -> str:
    """The table for a terminal: agreement with gold, mean over seeds, 95% intervals."""
    seeds, settings = document["seeds"], document["settings"]
    head = (
        f"{settings['testbed']}, {settings['model']}, pool of {settings['batch_size']}, alpha {settings['alpha']:g}, "
        f"calibration: {calibration_in_words(settings)}, {len(seeds)} seed{'s' if len(seeds) != 1 else ''}"
        f", search: {settings.get('search', 'annealing')}"
    )
    width = max([28, *(len(row["title"]) + 2 for row in document["rows"])])
    lines = [
        head,
        f"{'':<{width}}{'pool labels':<33}{'held-out claims':<33}{'against zero-shot':<38}against gold labels",
    ]
    for row in document["rows"]:
        test = row["test"]
        versus = test["versus"] if test else {}
        lines.append(
            f"{row['title']:<{width}}{_share_text(row['pool']):<33}{_share_text(test):<33}"
            f"{_difference_text(versus.get('zero-shot')):<38}{_difference_text(versus.get('many-shot-gold'))}".rstrip()
        )
    if "known" in settings or "gold_seeds" in settings:
        what = (
            f"{settings['gold_seeds']} gold labels of each pool are" if "gold_seeds" in settings else "some labels are"
        )
        lines.append(
            f"{what} known: kept by every search, shown by every other row, left out of the column pool labels."
        )
    lines += _class_lines(document, width)
    lines += [
        "mean over seeds ± standard deviation (95% interval over distinct claims); differences on held-out claims,",
        "bootstrapped over groups. Pool labels of the many-shot rows: each claim predicted from the others.",
    ]
    return "\n".join(lines)


def _class_lines(document: Mapping[str, Any], width: int) -> list[str]:
    """Balanced accuracy and F1 below the accuracies; nothing where the table was made without them."""
    if not any((row[name] or {}).get("f1") for row in document["rows"] for name in SETS):
        return []
    f1 = name_of_f1(names_of(document["settings"]))
    heads = ["pool: balanced accuracy", f1, "held-out: balanced accuracy", f1]
    lines = ["", f"{'':<{width}}{''.join(f'{head:<30}' for head in heads)}".rstrip()]
    for row in document["rows"]:
        found = [(row[name] or {}).get(key) for name in SETS for key in ("balanced_accuracy", "f1")]
        cells = [measure_text(None if one is None else Measure(**one), 3) for one in found]
        lines.append(f"{row['title']:<{width}}{''.join(f'{cell:<30}' for cell in cells)}".rstrip())
    return lines


def _judged(of_row: Mapping[int, RowResult], name: str) -> list[Judged]:
    return [
        Judged(seed, answer.claim, answer.group, answer.label == answer.gold)
        for seed, result in sorted(of_row.items())
        for answer in (result.pool if name == "pool" else result.test)
        if answer.gold is not None
    ]


def _by_class(of_row: Mapping[int, RowResult], name: str, claims: int) -> ByClass:
    """Over the seeds of one row."""
    answers = [result.pool if name == "pool" else result.test for _, result in sorted(of_row.items())]
    pairs = [[(answer.label, answer.gold) for answer in of_seed] for of_seed in answers]
    num_labels = next(num_labels_of(answer.offset) for of_seed in answers for answer in of_seed)
    return over_seeds([confusion(of_seed, num_labels) for of_seed in pairs], claims)


def _class_document(found: ByClass) -> dict[str, Any]:
    measures = {"balanced_accuracy": found.balanced, "f1": found.f1}
    return {name: None if one is None else asdict(one) for name, one in measures.items()}


def _share_document(share: Share) -> dict[str, Any]:
    return {
        "seeds": [
            {"seed": seed, "agreeing": right, "compared": compared, "interval": wilson_interval(right, compared)}
            for seed, (right, compared) in share.by_seed.items()
        ],
        "mean": share.mean,
        "sd": share.deviation,
        "claims": share.claims,
        "interval": share.interval,
    }


def _difference_document(difference: Difference) -> dict[str, Any]:
    return {
        "difference": difference.mean,
        "interval": difference.interval,
        "p": difference.p,
        "mcnemar": [
            {"seed": seed, "only_this": test.only_first, "only_other": test.only_second, "p": test.p}
            for seed, test in difference.mcnemar.items()
        ],
    }


def _share_text(share: Mapping[str, Any] | None) -> str:
    if share is None:
        return "-"
    spread = "" if share["sd"] is None else f" ± {share['sd']:.3f}"
    return f"{share['mean']:.3f}{spread} ({share['interval'][0]:.3f} to {share['interval'][1]:.3f})"


def _difference_text(difference: Mapping[str, Any] | None) -> str:
    if difference is None:
        return "-"
    low, high = difference["interval"]
    p = "p < 0.001" if difference["p"] < 0.001 else f"p = {difference['p']:.3f}"
    return f"{difference['difference']:+.3f} ({low:+.3f} to {high:+.3f}), {p}"
