"""Price files, and bills made from them."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import pytest

from src.icm.testbeds import BadInput
from src.results.costs import Price, Usage, charges, usage_of
from src.results.prices import read_prices
from src.results.run_reader import read_run
from tests.run_examples import write_run

GOOD = """
currency: EUR
date: 2026-11-21
source: the provider's page
models:
  fake-8b: {input_per_million_tokens: 2.0, cached_input_per_million_tokens: 0.5, output_per_million_tokens: 10}
  "*": {per_hour: 3}
"""


def prices(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "prices.yaml"
    path.write_text(text)
    return path


def test_a_bill(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "a", labels=[True, False] * 3))
    price = read_prices(prices(tmp_path, GOOD)).price_of(run)
    assert price is not None
    lines = {charge.what: charge.amount for charge in charges(usage_of(run), price)}
    # 110,000 prompt tokens in all, of which the search found 90,000 cached; 1,100 answers of one token.
    assert lines == pytest.approx(
        {
            "prompt tokens": 20_000 / 1e6 * 2,
            "cached prompt tokens": 90_000 / 1e6 * 0.5,
            "output tokens": 1100 / 1e6 * 10,
        }
    )


def test_without_a_price_for_cached_tokens_they_cost_what_others_do() -> None:
    usage = Usage(1e6, 9e5, 1e5, 0, None, 0, 0, 7200.0, True)
    price = Price("EUR", date(2026, 11, 21), "", input_per_million_tokens=2.0, per_hour=1.5)
    assert [(c.what, c.amount) for c in charges(usage, price)] == [("prompt tokens", 2.0), ("server time", 3.0)]


def test_any_other_model(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "a", labels=[True, False] * 3))
    only_hours = GOOD.replace("fake-8b", "other")
    price = read_prices(prices(tmp_path, only_hours)).price_of(run)
    assert price is not None
    assert price.per_hour == 3
    assert read_prices(prices(tmp_path, only_hours.replace('"*"', "third"))).price_of(run) is None


def test_a_run_that_is_not_finished_is_billed_at_least(tmp_path: Path) -> None:
    usage = usage_of(read_run(write_run(tmp_path / "a", labels=[True, False] * 3, finished=False)))
    assert (usage.complete, usage.prompt_tokens, usage.hit_rate) == (False, 300, pytest.approx(220 / 300))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (("2.0", "-2.0"), "input_per_million_tokens"),
        (("2.0", ".inf"), "input_per_million_tokens"),
        (("input_per_million_tokens", "input_per_million"), "Extra inputs"),
        (("2026-11-21", "soon"), "date"),
        (("currency: EUR\n", ""), "currency"),
        (("models:", "models"), "is not YAML"),
    ],
)
def test_a_wrong_price_file_is_refused(tmp_path: Path, change: tuple[str, str], complaint: str) -> None:
    with pytest.raises(BadInput, match=complaint):
        read_prices(prices(tmp_path, GOOD.replace(*change)))
    with pytest.raises(BadInput, match="cannot be read"):
        read_prices(tmp_path / "none.yaml")
