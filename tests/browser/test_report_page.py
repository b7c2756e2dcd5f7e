"""The report in a real browser: no error, no request, no accessibility violation, usable by keyboard, on any width."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, sync_playwright

from fixer.report.make import choose, summary_of, write_report
from tests.support import report_samples as samples

pytestmark = pytest.mark.browser

NAMES = ("chromium", "chromium-browser", "google-chrome")
THEMES = ("light", "dark")


@pytest.fixture(scope="module")
def browser():
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.fail("the browser tests need Chromium: apt-get install chromium (scripts/test does it)")
    with sync_playwright() as playwright:
        # As root Chromium has no sandbox; the only page that it opens is ours.
        started = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    """Reports: of a real tuning, of one with everything in it, of one that is neutral and lacks much."""
    home = tmp_path_factory.mktemp("home")
    neutral = home / "neutral.json"
    rows = (samples.cured(1), samples.kept(16))
    neutral.write_text(samples.artefact_of(*rows, model="<b>x</b>/" + "a-long-name" * 12).to_json())
    written = {}
    for name, path in (("real", samples.FP8), ("full", samples.full_home(home)), ("neutral", neutral)):
        written[name] = home / f"{name}.html"
        write_report(summary_of(choose(path, home), home, compiles=False), written[name], home)
    return written


class Opened:
    """A page with what happened on it."""

    def __init__(self, browser: Browser, path: Path, **options) -> None:
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **options})
        self.page: Page = self.context.new_page()
        self.said: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.url = path.as_uri()
        self.page.goto(self.url)

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("name", ["real", "full", "neutral"])
def test_no_error_no_request_no_violation(browser, pages, name, theme):
    with Opened(browser, pages[name], color_scheme=theme) as opened:
        for details in opened.page.locator("details").all():
            details.evaluate("element => { element.open = true }")
        results = Axe().run(opened.page)
        assert results.violations_count == 0, results.generate_report()
        assert opened.said == []
        assert opened.requests == [opened.url]


def test_the_first_screen_has_the_answer(browser, pages):
    with Opened(browser, pages["real"]) as opened:
        for text in ("qwen3-30b-a3b-fp8-dynamic", "NVIDIA H200", "14 of 19 batch sizes"):
            box = opened.page.get_by_text(text).first.bounding_box()
            assert box["y"] + box["height"] < 800
        heading = opened.page.get_by_role("heading", level=1)
        words = heading.inner_text().replace("\N{NO-BREAK SPACE}", " ").split()
        assert " ".join(words) == "7.2 % less time in the MoE layer on average"
        plot = opened.page.get_by_role("img", name="Time saved in the MoE layer at each batch size").bounding_box()
        assert plot["y"] + plot["height"] < 800


def test_the_keyboard_reaches_everything(browser, pages):
    with Opened(browser, pages["full"]) as opened:
        reached = []
        for _ in range(80):
            opened.page.keyboard.press("Tab")
            reached.append(
                opened.page.evaluate(
                    """() => {
                        const one = document.activeElement;
                        const caption = one.querySelector && one.querySelector(":scope > table > caption");
                        return [one.tagName, one.id || (caption && caption.id) || one.getAttribute("href") || ""];
                    }"""
                )
            )
            if reached[-1][0] == "BODY":
                break
        tags = [tag for tag, _ in reached]
        names = {name for _, name in reached}
        assert reached[0] == ["A", "#main"]
        assert reached[1] == ["INPUT", "theme-auto"]
        assert tags.count("SUMMARY") == 4
        assert {"rows-caption", "serve-caption", "environment-caption", "#rows", "#method"} <= names
        assert tags[-1] == "BODY"
        # A closed table is not in the way; a summary opens it, and then it is reached.
        opened.page.locator("summary").first.focus()
        opened.page.keyboard.press("Enter")
        opened.page.keyboard.press("Tab")
        assert opened.page.evaluate("document.activeElement.querySelector('caption').id") == "tiles-caption"


@pytest.mark.parametrize("scripts", [True, False], ids=["with scripts", "without"])
def test_the_theme_is_chosen_by_keyboard(browser, pages, scripts):
    with Opened(browser, pages["real"], color_scheme="light", java_script_enabled=scripts) as opened:
        seen = []
        opened.page.locator("#theme-auto").focus()
        for _ in range(3):
            shot = opened.page.screenshot(clip={"x": 2, "y": 300, "width": 1, "height": 1})
            seen.append(shot)
            opened.page.keyboard.press("ArrowRight")
        auto, light, dark = seen
        assert auto == light != dark


def test_the_choice_is_remembered_where_it_can_be(browser, pages):
    with Opened(browser, pages["real"], color_scheme="light") as opened:
        opened.page.locator("#theme-dark").check(force=True)
        opened.page.reload()
        assert opened.page.locator("#theme-dark").is_checked()
        assert opened.said == []


@pytest.mark.parametrize("width", [360, 768, 1920])
@pytest.mark.parametrize("name", ["full", "neutral"])
def test_no_width_makes_the_page_scroll_sideways(browser, pages, name, width):
    with Opened(browser, pages[name], viewport={"width": width, "height": 740}) as opened:
        assert opened.page.evaluate("document.documentElement.scrollWidth") <= width


def test_colours_of_plots_follow_the_theme(browser, pages):
    colours = []
    for theme in THEMES:
        with Opened(browser, pages["real"], color_scheme=theme) as opened:
            colours.append(
                opened.page.evaluate(
                    """() => [...document.querySelectorAll("svg text")].map((text) => getComputedStyle(text).fill)"""
                )
            )
    assert len(colours[0]) > 100
    assert all(light != dark for light, dark in zip(*colours, strict=True))


def test_it_prints_with_every_detail_open(browser, pages):
    with Opened(browser, pages["real"], color_scheme="dark") as opened:
        opened.page.emulate_media(media="print")
        assert opened.page.locator("nav").is_hidden()
        assert opened.page.get_by_text("The standard error of the gain").is_visible()
        assert opened.page.evaluate("getComputedStyle(document.documentElement).colorScheme") == "light"
        assert opened.page.pdf(format="A4").startswith(b"%PDF")
