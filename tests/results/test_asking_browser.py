"""The page of `icm ask` in a real browser: answered by keys and by clicks, saved, remembered, usable by everyone.

Needs Playwright and a Chromium (make setup-browser); skipped where either is missing.
"""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

from src.icm.columns import Reading
from src.pipeline.datafiles import load_data_file
from src.pipeline.known import read_known
from src.results.asking import choose, doubts_of
from src.results.asking_view import Sheet, sheet_of
from src.results.page import render_asking
from src.results.run_reader import read_run
from tests.results.test_browser import CHROMIUM, Seen, browser, opened
from tests.results.test_page import ATTACKS
from tests.run_examples import write_run

__all__ = ["browser"]  # the fixture

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (make setup-browser, or ICM_TEST_CHROMIUM=PATH)"),
]

HALF = [at % 2 == 0 for at in range(40)]
ODDS = [(1 + at / 10) * (1 if label else -1) for at, label in enumerate(HALF)]
MANY = {"labels": [f"mood {at}" for at in range(11)], "label_texts": [f" mood {at}" for at in range(11)]}


def made(tmp_path: Path, count: int = 10, **changes: Any) -> tuple[Sheet, str]:
    values: dict[str, Any] = {"labels": HALF, "log_odds": ODDS} | changes
    record = read_run(write_run(tmp_path / "run", **values))
    doubts = doubts_of(record).found
    sheet = sheet_of(record, choose(doubts, count, "margin"), doubts, ())
    return sheet, render_asking(
        sheet, "What is right?", f"{count} claims of a run", "answers.csv", "icm label --known x"
    )


async def saved(seen: Seen, press: str = "s") -> bytes:
    async with seen.page.expect_download() as download:
        await seen.page.keyboard.press(press)
    assert (await download.value).suggested_filename == "answers.csv"
    return Path(await (await download.value).path()).read_bytes()


async def says(told: Any, text: str) -> None:
    """Waits for it: a key is pressed before the page has answered it."""
    from playwright.async_api import expect

    await expect(told).to_have_text(text)


def labels_of(content: bytes) -> list[str]:
    return [row["label"] for row in csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline=""))]


async def test_ten_claims_are_answered_by_keyboard(browser: Any, tmp_path: Path) -> None:
    sheet, page = made(tmp_path)
    seen = await opened(browser, tmp_path / "answers.html", page)
    told = seen.page.locator("output")
    await says(told, "0 of 10 answered")
    for key in "12u12u1212":
        await seen.page.keyboard.press(key)
    await says(told, "10 of 10 answered")
    assert await seen.page.locator("progress").get_attribute("value") == "10"
    content = await saved(seen)
    given = ["True", "False", "unsure", "True", "False", "unsure", "True", "False", "True", "False"]
    assert labels_of(content) == given
    await says(told, "10 of 10 answered; answers.csv saved")
    expected = sheet.content
    for label in given:
        expected = expected.replace(',"",', f',"{label}",', 1)
    assert content == b"\xef\xbb\xbf" + expected.encode()
    assert seen.complaints == []
    assert not [url for url in seen.requests if not url.startswith(("file:", "blob:", "data:"))]


async def test_what_the_page_saves_is_read_as_known_labels(browser: Any, tmp_path: Path) -> None:
    texts = [text.replace("\ud800", "") for text in ATTACKS] + ["=1+1", "مرحبا", 'two\nlines, "quoted"']
    data = tmp_path / "claims.jsonl"
    rows = [{"question": text, "choice": f"{text} {at}"} for at, text in enumerate([*texts, *["plain"] * 9])]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sheet, page = made(tmp_path, 10, claims=rows, labels=HALF[:20], log_odds=ODDS[:20])
    seen = await opened(browser, tmp_path / "answers.html", page)
    for key in "12u12u1212":
        await seen.page.keyboard.press(key)
    file = tmp_path / "answers.csv"
    file.write_bytes(await saved(seen))
    testbed, claims, path = load_data_file(data)
    found = read_known(file, testbed, claims, path, Reading())
    asked = [int(card.row) for card in sheet.cards]
    given = [True, False, None, True, False, None, True, False, True, False]
    assert dict(found.labels) == {row: label for row, label in zip(asked, given, strict=True) if label is not None}
    assert len(asked) == 10


async def test_without_an_answer_the_file_is_the_one_that_was_written(browser: Any, tmp_path: Path) -> None:
    claims = [{"question": text, "choice": text} for text in [*ATTACKS, "=1+1", "مرحبا", "", 'two\nlines, "quoted"']]
    sheet, page = made(tmp_path, 40, claims=claims)
    seen = await opened(browser, tmp_path / "answers.html", page)
    assert await saved(seen) == sheet.content.encode("utf-8-sig")
    assert seen.complaints == []


async def test_hostile_claims_are_text(browser: Any, tmp_path: Path) -> None:
    claims = [{"question": text, "choice": text} for text in [*ATTACKS, "مرحبا", ""]]
    _, page = made(tmp_path, 40, claims=claims, settings={"model": ATTACKS[1], "testbed": ATTACKS[0]})
    seen = await opened(browser, tmp_path / "answers.html", page)
    assert seen.complaints == []
    assert await seen.page.locator("iframe, img, object, embed").count() == 0
    assert await seen.page.locator("script").count() == 1
    # In rows 0 to 9 of the file the texts are these, twice each; the order is that of the margins, which is theirs.
    texts = await seen.page.locator("article .t").all_text_contents()
    for text in ATTACKS[:5]:
        assert texts.count(text) == 2
    assert any("<U+202E>" in text for text in texts)
    assert sum(len(text) for text in texts if set(text) == {"x"}) == 2 * len(ATTACKS[-1])
    arabic = seen.page.locator("article .t", has_text="مرحبا").first
    assert await arabic.evaluate("one => getComputedStyle(one).direction") == "rtl"
    assert await seen.page.get_by_text("(this claim is empty)").is_visible()


async def test_answers_survive_a_reload_and_can_be_taken_back(browser: Any, tmp_path: Path) -> None:
    _, page = made(tmp_path)
    seen = await opened(browser, tmp_path / "answers.html", page)
    for key in "12u":
        await seen.page.keyboard.press(key)
    await seen.page.reload()
    told = seen.page.locator("output")
    await says(told, "3 of 10 answered")
    await seen.page.keyboard.press("1")  # of the fourth: the first without an answer
    await says(told, "4 of 10 answered")
    await seen.page.keyboard.press("ArrowUp")
    await seen.page.keyboard.press("1")
    await says(told, "3 of 10 answered")
    assert labels_of(await saved(seen))[:5] == ["True", "False", "unsure", "", ""]
    # Answers belong to these claims: another list of claims begins empty.
    _, fewer = made(tmp_path, 5)
    (tmp_path / "answers.html").write_text(fewer)
    await seen.page.reload()
    await says(told, "0 of 5 answered")


async def test_clicks_and_tabs_do_the_same(browser: Any, tmp_path: Path) -> None:
    _, page = made(tmp_path)
    seen = await opened(browser, tmp_path / "answers.html", page)
    await seen.page.locator("article").nth(4).get_by_role("button", name="False").click()
    await seen.page.locator("article").nth(6).get_by_role("button", name="unsure").focus()
    await seen.page.keyboard.press("Enter")
    await seen.page.locator("[data-keys]").uncheck()
    await seen.page.keyboard.press("1")  # keys are off
    await seen.page.locator("[data-save]").focus()
    assert labels_of(await saved(seen, "Enter")) == [*[""] * 4, "False", "", "unsure", *[""] * 3]


async def test_eleven_labels_have_nine_keys_and_eleven_buttons(browser: Any, tmp_path: Path) -> None:
    settings = {**MANY}
    record = read_run(write_run(tmp_path / "run", labels=HALF, settings=settings))
    doubts = doubts_of(record).found
    sheet = sheet_of(record, choose(doubts, 3, "random"), doubts, ())
    page = render_asking(sheet, "What is right?", "moods", "answers.csv", "icm label")
    seen = await opened(browser, tmp_path / "answers.html", page)
    await seen.page.keyboard.press("9")
    await seen.page.locator("article").nth(1).get_by_role("button", name="mood 10").click()
    assert labels_of(await saved(seen)) == ["mood 8", "mood 10", ""]


async def test_without_javascript_it_says_what_to_do(browser: Any, tmp_path: Path) -> None:
    _, page = made(tmp_path)
    seen = await opened(browser, tmp_path / "answers.html", page, java_script_enabled=False)
    assert await seen.page.get_by_text("Clicking needs JavaScript").is_visible()
    assert await seen.page.locator("article button:visible").count() == 0
    assert await seen.page.locator("article .t:visible").count() >= 20


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_everyone_can_use_it(browser: Any, tmp_path: Path, scheme: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.async_playwright", reason="axe is not installed")
    claims = [{"question": text, "choice": text} for text in [*ATTACKS, "مرحبا", ""]]
    _, page = made(tmp_path, 40, claims=claims)
    seen = await opened(browser, tmp_path / "answers.html", page, color_scheme=scheme, bypass_csp=True)
    for key in "12u":
        await seen.page.keyboard.press(key)
    for details in await seen.page.locator("details").all():
        await details.evaluate("one => one.open = true")
    found = await axe.Axe().run(seen.page)
    assert found.violations_count == 0, json.dumps(found.response["violations"], indent=1)[:3000]


async def test_a_narrow_screen_does_not_scroll_sideways(browser: Any, tmp_path: Path) -> None:
    claims = [{"question": text, "choice": text} for text in ATTACKS]
    _, page = made(tmp_path, 40, claims=claims)
    seen = await opened(browser, tmp_path / "answers.html", page)
    await seen.page.set_viewport_size({"width": 390, "height": 800})
    assert await seen.page.evaluate("document.documentElement.scrollWidth") <= 390
