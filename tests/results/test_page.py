"""The page: what it says, and that claims on it are text and nothing else."""

from __future__ import annotations

import html
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from src.results.page import render_comparison, render_report
from src.results.prices import PriceFile
from src.results.run_reader import BaselineTable, read_run
from src.results.side_by_side import as_text, compare, shared_curves
from src.results.text import whole
from tests.run_examples import write_run

HALF = [n % 2 == 0 for n in range(40)]
ATTACKS = [
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(1)>",
    '"><svg onload=alert(1)>',
    "{{ 7 * 7 }}{% include '/etc/passwd' %}",
    "<!-- --><style>*{display:none}</style>",
    "half \ud800 character, bell \x07, null \x00, \u202eturned",
    "</table></main><iframe src=javascript:alert(1)>",
    "x" * 5000,
]


class Elements(HTMLParser):
    """Tags and attributes of a page, as a parser sees them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    handle_startendtag = handle_starttag


def page_of(tmp_path: Path, **changes: Any) -> str:
    values: dict[str, Any] = {"labels": HALF, "gold": HALF, "zero_shot": [1.0 if h else -1.0 for h in HALF]} | changes
    return render_report([], [read_run(write_run(tmp_path / "run", **values))])


def test_the_page_has_what_a_reader_asks_for(tmp_path: Path) -> None:
    page = page_of(tmp_path, mirror=12.0)
    for wanted in (
        "agreement with gold", "40 of 40", "zero-shot", "0.912 to 1.000", "Collapse to one label", "U(D)",
        "Calibration", "choice 39", "prompt tokens", "110,000", "alpha", "fake-8b", "Seconds a step",
    ):  # fmt: skip
        assert wanted in page, wanted


def test_claims_are_inert(tmp_path: Path) -> None:
    claims = [{"question": text, "choice": text, "consistency_id": text} for text in ATTACKS]
    page = page_of(tmp_path, claims=claims, settings={"testbed": ATTACKS[0], "model": ATTACKS[2]})
    plain = page_of(tmp_path / "plain", settings={"testbed": "t", "model": "m"})
    found, expected = Elements(page), Elements(plain)
    assert found.tags.count("script") == expected.tags.count("script") == 1
    assert found.tags.count("style") == 1
    assert set(found.tags) - set(expected.tags) == {"details", "summary"} - set(expected.tags)  # of the long claim
    assert not [name for _, name, _ in found.attributes if name.startswith("on") or name == "style"]
    assert not {"\x00", "\x07", "\u202e"} & set(page)
    assert "<U+D800>" in html.unescape(page)
    page.encode("utf-8")
    for text in ATTACKS[:5]:
        assert html.escape(text, quote=False).split("\n")[0] in page.replace("&#34;", '"').replace("&#39;", "'")


def test_nothing_is_fetched_and_nothing_unknown_runs(tmp_path: Path) -> None:
    page = page_of(tmp_path)
    elements = Elements(page)
    policy = next(value for tag, name, value in elements.attributes if tag == "meta" and name == "content" and value)
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    addresses = [value for tag, name, value in elements.attributes if name in ("src", "href") and tag != "a"]
    assert addresses == ["data:,"]
    assert not re.search(r"@import|url\(", page)


def test_a_run_in_progress(tmp_path: Path) -> None:
    page = page_of(tmp_path, finished=False)
    assert "not finished" in page
    assert "labels so far" in page


def test_a_claim_without_a_label_was_labelled_by_nothing(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", labels=HALF, gold=HALF))
    assert '<td class="by">–</td>' not in render_report([], [run])
    first, *others = run.claims
    page = render_report([], [replace(run, claims=(replace(first, label=None), *others))])
    assert page.count('<td class="by">–</td>') == 1
    assert page.count('<td class="by">icm</td>') == len(others)


def test_money(tmp_path: Path) -> None:
    prices = PriceFile.model_validate(
        {"currency": "EUR", "date": "2026-11-21", "source": "<b>me</b>", "models": {"*": {"per_hour": 60}}}
    )
    page = render_report([], [read_run(write_run(tmp_path / "a", labels=HALF))], prices)
    assert "1.0000" in page  # a minute of a server at 60 an hour
    assert "2026-11-21" in page
    assert "<b>me</b>" not in page


def test_baselines_and_several_runs(tmp_path: Path) -> None:
    side = {"mean": 0.875, "sd": 0.01, "interval": [0.8, 0.95], "claims": 40, "seeds": [],
            "versus": {"zero-shot": {"difference": 0.375, "interval": [0.2, 0.5], "p": 0.003}}}  # fmt: skip
    row = {"row": "icm", "title": "ICM <x>", "pool": side, "test": None}
    table = BaselineTable.model_validate(
        {"name": "t", "rows": [row], "seeds": [1], "seeds_asked": [1, 2], "complete": False}
    )
    runs = [read_run(write_run(tmp_path / name, labels=HALF, gold=HALF)) for name in ("a", "b")]
    page = render_report([table], runs)
    for wanted in ("0.875", "+0.375", "0.003", "not finished"):
        assert wanted in page
    assert "ICM &lt;x&gt;" in page
    assert "Labels that flip between runs" in page
    assert page.count('<table class="claims">') == 2


def test_one_series_a_run_and_everything_in_the_tables(tmp_path: Path) -> None:
    first = read_run(write_run(tmp_path / "a", labels=HALF, gold=HALF))
    second = read_run(
        write_run(tmp_path / "b", labels=[not HALF[0], *HALF[1:]], gold=HALF, settings={"seed": 2, "model": ATTACKS[0]})
    )
    grids = compare([first, second])
    text = as_text(grids)
    assert [grid.title for grid in grids] == ["Settings that differ", "Results", "Cost", "Agreement between runs"]
    assert "0.975 (39 of 40)" in text
    assert re.search(r"seed +1 +2", text)
    # Those of the search, as the summary of a run says, without what was asked afterwards.
    cost = first.cost
    assert first.model_api["prompt_tokens"] > cost["tokens_cached"] + cost["tokens_computed"]
    of_search = whole(cost["tokens_cached"] + cost["tokens_computed"])
    assert re.search(rf"prompt tokens +{of_search} ", text)
    page = render_comparison(grids, shared_curves([first, second]), None, [], "a, b")
    assert Elements(page).tags.count("script") == 1


def test_without_jinja_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from src.icm.testbeds import BadInput

    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(BadInput, match=r"icm-elicitation\[report\]"):
        page_of(tmp_path)
