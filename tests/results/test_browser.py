"""The page in a real browser: what it shows with and without JavaScript, how fast, and whether everyone can use it.

Needs Playwright and a Chromium (make setup-browser); skipped where either is missing.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from src.results.page import render_comparison, render_landscape, render_report, render_sweep
from src.results.run_reader import read_run
from src.results.side_by_side import compare, shared_curves
from src.results.sweep_table import Figure
from tests.results.test_landscape import landscape, uphill
from tests.results.test_page import ATTACKS
from tests.results.test_sweep_table import ALPHAS, figure, table
from tests.run_examples import write_run

playwright = pytest.importorskip("playwright.async_api", reason="Playwright is not installed (make setup-browser)")

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = os.environ.get("ICM_TEST_CHROMIUM") or next((path for name in NAMES if (path := shutil.which(name))), None)
HALF = [n % 2 == 0 for n in range(40)]

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (make setup-browser, or ICM_TEST_CHROMIUM=PATH)"),
]


@pytest.fixture
async def browser() -> AsyncIterator[Any]:
    async with playwright.async_playwright() as driver:
        # --no-sandbox: the tests may run as root in a container, and open pages of their own only.
        opened = await driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        await opened.close()


class Seen:
    """A page, and what it asked for and complained of."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.requests: list[str] = []
        self.complaints: list[str] = []
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("console", lambda message: self.complaints.append(message.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("dialog", lambda dialog: self.complaints.append(f"dialog: {dialog.message}"))


async def opened(browser: Any, path: Path, text: str, **context: Any) -> Seen:
    path.write_text(text, encoding="utf-8")
    made = await browser.new_context(viewport={"width": 1240, "height": 900}, **context)
    seen = Seen(await made.new_page())
    await seen.page.goto(path.as_uri())
    return seen


def report(tmp_path: Path, **changes: Any) -> str:
    values: dict[str, Any] = {"labels": HALF, "gold": [*HALF[:38], *[not label for label in HALF[38:]]],
                              "zero_shot": [1.0 if h else -1.0 for h in HALF], "mirror": 8.0} | changes  # fmt: skip
    return render_report([], [read_run(write_run(tmp_path / "run", **values))])


async def test_filters_and_order(browser: Any, tmp_path: Path) -> None:
    odds = [float(n + 1) * (1 if label else -1) for n, label in enumerate(HALF)]
    seen = await opened(browser, tmp_path / "r.html", report(tmp_path, log_odds=odds))
    page, told = seen.page, seen.page.locator("output")
    rows = page.locator("[data-claims] tbody tr:visible")
    assert (await rows.count(), await told.inner_text()) == (40, "40 of 40 claims")
    await page.locator("[data-filter=text]").fill("CHOICE 39")
    assert (await rows.count(), await told.inner_text()) == (1, "1 of 40 claims")
    await page.locator("[data-filter=text]").fill("")
    await page.locator("[data-filter=gold]").select_option("differs")
    assert await rows.count() == 2
    await page.locator("[data-filter=gold]").select_option("any")
    await page.locator("[data-filter=label]").select_option("True")
    await page.locator("[data-filter=least]").fill("30")
    assert await rows.count() == 5
    await page.locator("[data-filter=least]").fill("")
    await page.locator("[data-filter=label]").select_option("any")
    await page.locator("[data-filter=order]").select_option("most sure first")
    assert "choice 39" in await rows.first.inner_text()
    await page.locator("[data-filter=order]").select_option("of the run")
    assert "choice 0" in await rows.first.inner_text()
    assert await rows.count() == 40
    assert seen.complaints == []


async def test_without_javascript_everything_but_the_filters_is_there(browser: Any, tmp_path: Path) -> None:
    seen = await opened(browser, tmp_path / "r.html", report(tmp_path), java_script_enabled=False)
    page = seen.page
    assert await page.locator("[data-claims] tbody tr:visible").count() == 40
    assert await page.locator(".filters").is_hidden()
    assert await page.get_by_text("Filtering needs JavaScript").is_visible()
    assert await page.locator("figure svg:visible").count() >= 11
    assert await page.locator("figure svg path[stroke='var(--s0)']").first.bounding_box()


async def test_no_column_of_the_results_is_cut_off_on_a_wide_screen(browser: Any, tmp_path: Path) -> None:
    figures = {name: figure(0.5, 0.4, 0.6) for name in ("agreement", "balanced accuracy", "F1")}
    counts = {"zero-shot": 0.516, "zero-shot calibrated": 0.453, "U": 94.5, "labelled": 13.0, "iterations": 205.5}
    figures |= {name: Figure(mean, mean / 9, {}) for name, mean in (counts | {"inconsistent pairs": 0.5}).items()}
    wide = table({("10", "none"): figures, ("50", "mean"): figures}, ("alpha", "calibrate"))
    for name, text in {"report": report(tmp_path), "sweep": render_sweep(wide)}.items():
        seen = await opened(browser, tmp_path / f"{name}.html", text)
        tables = await seen.page.eval_on_selector_all(".wide", "all => all.map(e => [e.scrollWidth, e.clientWidth])")
        assert tables
        assert all(content <= room for content, room in tables), name


async def test_nothing_is_asked_of_any_network(browser: Any, tmp_path: Path) -> None:
    seen = await opened(browser, tmp_path / "r.html", report(tmp_path))
    assert seen.requests == [(tmp_path / "r.html").as_uri()]
    assert seen.complaints == []


async def test_hostile_claims_stay_text(browser: Any, tmp_path: Path) -> None:
    claims = [{"question": text, "choice": text} for text in ATTACKS]
    seen = await opened(browser, tmp_path / "r.html", report(tmp_path, claims=claims, settings={"model": ATTACKS[1]}))
    page = seen.page
    assert seen.complaints == []  # no dialog, no refused script
    assert seen.requests == [(tmp_path / "r.html").as_uri()]
    assert await page.locator("iframe, img, object, embed").count() == 0
    assert await page.locator("script").count() == 1
    texts = await page.locator("[data-claims] tbody .t").all_text_contents()
    assert texts[0] == ATTACKS[0]
    assert texts[3] == ATTACKS[3]  # no template was rendered twice
    assert "<U+202E>" in texts[5]
    # Markup that got in all the same could not run: the policy knows one script only.
    await page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=\"x:\" onerror=\"alert(1)\">')")
    await page.evaluate(
        "document.head.append(Object.assign(document.createElement('script'), {text: 'window.ran = 1'}))"
    )
    assert await page.evaluate("window.ran") is None
    assert all("Content Security Policy" in told for told in seen.complaints)
    assert seen.complaints


async def test_it_opens_within_a_second_with_2560_claims(browser: Any, tmp_path: Path) -> None:
    labels = [n % 2 == 0 for n in range(2560)]
    text = "A claim of an ordinary length, of which a data set may hold thousands, to be read by a person. " * 3
    claims = [{"question": f"Question {n // 2}?", "choice": f"{n}: {text}"} for n in range(2560)]
    made = report(tmp_path, labels=labels, gold=labels, zero_shot=None, claims=claims, seeds=2558)
    times = []
    for _ in range(5):
        seen = await opened(browser, tmp_path / "r.html", made)
        timing = await seen.page.evaluate("performance.getEntriesByType('navigation')[0].toJSON()")
        times.append(timing["loadEventEnd"])
        assert await seen.page.locator("[data-claims] tbody tr").count() == 2560
        await seen.page.context.close()
    # The machine may be busy with other tests: the best of five says what the page needs.
    assert min(times) < 1000, times


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_everyone_can_use_it(browser: Any, tmp_path: Path, scheme: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.async_playwright", reason="axe is not installed")
    bad = read_run(write_run(tmp_path / "bad", labels=[True] * 40, gold=HALF))
    good = read_run(write_run(tmp_path / "good", labels=HALF, gold=HALF, zero_shot=[1.0 if h else -1.0 for h in HALF]))
    pages = {
        "report": render_report([], [bad, good]),
        "compare": render_comparison(compare([bad, good]), shared_curves([bad, good]), None, [], "bad, good"),
        "landscape": render_landscape(landscape(uphill), "builtin, 20 claims"),
        "sweep": render_sweep(ALPHAS),
    }
    for name, text in pages.items():
        seen = await opened(browser, tmp_path / f"{name}.html", text, color_scheme=scheme, bypass_csp=True)
        for details in await seen.page.locator("details").all():
            await details.evaluate("one => one.open = true")
        found = await axe.Axe().run(seen.page)
        assert found.violations_count == 0, json.dumps(found.response["violations"], indent=1)[:3000]


async def test_dark_is_dark(browser: Any, tmp_path: Path) -> None:
    colors = {}
    for scheme in ("light", "dark"):
        seen = await opened(browser, tmp_path / "r.html", report(tmp_path), color_scheme=scheme)
        colors[scheme] = await seen.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert colors == {"light": "rgb(255, 255, 255)", "dark": "rgb(15, 20, 25)"}


async def test_a_narrow_screen_does_not_scroll_sideways(browser: Any, tmp_path: Path) -> None:
    seen = await opened(browser, tmp_path / "r.html", report(tmp_path))
    await seen.page.set_viewport_size({"width": 390, "height": 800})
    width = await seen.page.evaluate("document.documentElement.scrollWidth")
    assert width <= 390
