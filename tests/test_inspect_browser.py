"""The page about a data set in a real browser: it loads nothing, believes no record, and works by mouse and keys.

Chromium is that of the system (Debian's package `chromium`), driven by playwright. Without one these tests are skipped,
or fail if `SFT_FAST_REQUIRE_CHROMIUM` is set: `make test-browser`.
"""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright import sync_api as playwright

import sft_fast
from tests.page_helpers import HOSTILE, make_page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        CHROMIUM is None and not os.environ.get("SFT_FAST_REQUIRE_CHROMIUM"),
        reason="no Chromium on this machine: apt install chromium, then make test-browser",
    ),
]

# Of the text of an element on its background, through whatever lies transparent between: WCAG's contrast ratio.
CONTRAST = """element => {
  const parse = (text) => (text.match(/[\\d.]+/g) || []).map(Number);
  let background = [0, 0, 0, 0];
  for (let at = element; at && !(background.length === 3 || background[3] === 1); at = at.parentElement) {
    background = parse(getComputedStyle(at).backgroundColor);
  }
  const luminance = ([red, green, blue]) => [red, green, blue]
    .map((part) => part / 255)
    .map((part) => part <= 0.03928 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4)
    .reduce((sum, part, index) => sum + part * [0.2126, 0.7152, 0.0722][index], 0);
  const [one, two] = [luminance(parse(getComputedStyle(element).color)), luminance(background)];
  return (Math.max(one, two) + 0.05) / (Math.min(one, two) + 0.05);
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, without a window."""
    with playwright.sync_playwright() as driver:
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
        chromium = driver.chromium.launch(executable_path=CHROMIUM or "chromium", args=sandbox)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def written(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[sft_fast.Dataset, Path]:
    """A data set with hostile records, and its page."""
    return make_page(tmp_path_factory.mktemp("page"), tokenizer_dir)


@pytest.fixture
def opened(browser: Any, written: tuple[sft_fast.Dataset, Path], request: pytest.FixtureRequest) -> Iterator[Any]:
    """The page, opened; whatever it requests, prints or raises is an error in the end."""
    options = {"viewport": {"width": 1280, "height": 900}, "color_scheme": "light", **getattr(request, "param", {})}
    context = browser.new_context(reduced_motion="reduce", **options)
    view = context.new_page()
    events: list[str] = []
    view.on("request", lambda sent: events.append(f"request {sent.url}"))
    view.on("console", lambda message: events.append(f"console {message.text}"))
    view.on("pageerror", lambda error: events.append(f"error {error}"))
    view.on("dialog", lambda dialog: events.append(f"dialog {dialog.message}"))
    view.goto(written[1].as_uri())
    yield view
    context.close()
    assert events == [f"request {written[1].as_uri()}"]


def show(view: Any, kind: str, find: str = "") -> None:
    """Chooses a list, and what it is searched for."""
    view.select_option("#list", kind)
    view.fill("#find", find)


@pytest.mark.parametrize("text", HOSTILE)
def test_records_are_shown_and_not_believed(opened: Any, text: str) -> None:
    """A record that is HTML, script or a place of the template is shown letter by letter, and nothing of it runs."""
    show(opened, "random", text)

    shown = opened.inner_text("#view .tokens").replace("⏎", "")
    assert text.translate({0x2028: "\ufffd", 0x202E: "\ufffd", 0x1B: "\u241b"}) in shown
    assert opened.evaluate("window.broken") is None
    assert opened.locator("#view img, #view svg, #view script").count() == 0


def test_colour_is_the_mask(opened: Any, written: tuple[sft_fast.Dataset, Path]) -> None:
    """The tokens that are shown as trained on are those of the label mask, for each sample of the list."""
    dataset, _ = written
    show(opened, "random")
    data = json.loads(opened.inner_text("#data"))
    for at, number in enumerate(data["lists"]["random"][:12]):
        opened.locator("#entries li").nth(at).click()

        classes = opened.locator("#view .token").evaluate_all("all => all.map(one => one.className.split(' '))")
        assert ["trained" in names for names in classes] == dataset[number].label_mask.tolist()
        assert opened.inner_text("#view h3") == dataset[number].source


def test_spelled_text_has_a_colour_of_its_own(opened: Any) -> None:
    """Text that spells a control token has another colour than the real one, and a list of its own."""
    show(opened, "spelled")
    colours = [
        opened.locator(f"#view .token.{name}").first.evaluate("one => getComputedStyle(one).backgroundColor")
        for name in ("spelled", "control", "trained:not(.control):not(.spelled)")
    ]

    assert len(set(colours)) == 3
    assert opened.locator("#entries li").count() == 1


def test_keys_reach_everything(opened: Any) -> None:
    """By keys alone: past the navigation to the samples, along the list, to its end, and back."""
    opened.keyboard.press("Tab")
    assert opened.evaluate("document.activeElement.className") == "skip"
    opened.keyboard.press("Enter")
    reached = []
    for _ in range(6):
        opened.keyboard.press("Tab")
        reached.append(opened.evaluate("document.activeElement.id"))
    assert reached[:6] == ["list", "find", "entries", "borders", "ids", "view"]
    opened.focus("#entries")
    first = opened.inner_text("#view h3")
    opened.keyboard.press("ArrowDown")
    second = opened.inner_text("#view h3")
    opened.keyboard.press("End")
    chosen = opened.get_attribute("#entries", "aria-activedescendant")
    assert second != first
    assert opened.locator("#entries li[aria-selected=true]").get_attribute("id") == chosen
    assert opened.locator("#entries li").last.get_attribute("id") == chosen
    opened.keyboard.press("Home")
    assert opened.inner_text("#view h3") == first


def test_packs_show_their_samples(opened: Any, written: tuple[sft_fast.Dataset, Path]) -> None:
    """A pack is shown with all its samples, in their order, and how full it is."""
    dataset, _ = written
    show(opened, "packs")
    packing = dataset.pack(sequence_length=1024)
    titles = opened.locator("#view article h3").all_inner_texts()
    number = int(opened.inner_text("#view div > h3").removeprefix("Pack ").replace(",", ""))

    assert titles == [dataset[int(sample)].source for sample in packing[number]]
    assert f"{int(dataset.lengths[packing[number]].sum()):,} of 1,024 tokens" in opened.inner_text(
        "#view .meta >> nth=0"
    )


def test_find_and_links(opened: Any) -> None:
    """A search lists the samples with a text and marks it; nothing found is said; a duplicate links to its sample."""
    show(opened, "random", "onerror")
    assert opened.locator("#entries li").count() > 0
    assert opened.locator("#view mark").count() > 0
    show(opened, "random", "nothing has this text")
    assert "0 of" in opened.inner_text("#entries-note")
    assert "Nothing has this text" in opened.inner_text("#view")
    link = opened.locator("#duplicates a").first
    source = link.inner_text()
    link.click()
    assert opened.inner_text("#view h3") == source


def test_ids_and_borders(opened: Any, written: tuple[sft_fast.Dataset, Path]) -> None:
    """The switch shows the id behind each token."""
    number = json.loads(opened.inner_text("#data"))["lists"]["random"][0]
    opened.check("#ids")
    opened.check("#borders")

    assert opened.locator("#view .token sub").all_inner_texts() == list(map(str, written[0][number].input_ids))
    assert opened.locator("#view .tokens.borders").count() == 1


@pytest.mark.parametrize("opened", [{"color_scheme": scheme} for scheme in ("light", "dark")], indirect=True)
def test_contrast_in_both_themes(opened: Any) -> None:
    """Text has a contrast of 4.5 to 1 or more on what is behind it, tokens of each kind too, in both themes."""
    show(opened, "spelled")
    places = ["h1", ".lead", "nav a", ".figure dt", ".figure dd", ".figure small", ".plot p", "summary", "thead th"]
    places += ["tbody td", "#entries li small", "#entries li[aria-selected=true] b", ".meta", ".legend .token >> nth=2"]
    places += ["#view .token:not(.trained)", "#view .token.trained", "#view .token.odd.trained", "#view .token.control"]
    places += ["#view .token.spelled", "#view .token.control.trained", "#duplicates a"]
    contrasts = {place: opened.locator(place).first.evaluate(CONTRAST) for place in places}

    assert {place: round(value, 2) for place, value in contrasts.items() if value < 4.5} == {}


def test_theme_is_chosen(opened: Any) -> None:
    """The button goes from the system's theme to light and dark, says which, and plots follow."""
    page_colour = "getComputedStyle(document.body).backgroundColor"
    bar_colour = "getComputedStyle(document.querySelector('.plot [aria-roledescription=bar]')).fill"
    seen = []
    for _ in range(4):
        label = opened.get_attribute("#theme", "aria-label")
        seen.append((label, opened.evaluate(page_colour), opened.evaluate(bar_colour)))
        opened.click("#theme")

    assert [label for label, _, _ in seen] == [
        "Theme: as the system",
        "Theme: light",
        "Theme: dark",
        "Theme: as the system",
    ]
    assert seen[0][1:] == seen[1][1:] == seen[3][1:]
    assert seen[2][1] != seen[1][1]
    assert seen[2][2] != seen[1][2]


@pytest.mark.parametrize(
    "opened", [{"viewport": {"width": width, "height": 800}} for width in (360, 1600)], indirect=True
)
def test_no_width_is_too_small(opened: Any) -> None:
    """The page never scrolls sideways; tables and plots keep within it."""
    assert opened.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_bars_are_there_and_say_what_they_show(opened: Any) -> None:
    """Each plot has bars that can be seen, and the words of a bar are shown where the pointer is on it."""
    plots = opened.locator("figure.plot")
    assert plots.count() >= 5
    for number in range(plots.count()):
        boxes = (
            plots.nth(number)
            .locator("[aria-roledescription=bar]")
            .evaluate_all("all => all.map(one => one.getBBox()).filter(box => box.width > 1 && box.height > 1).length")
        )
        assert boxes > 0, plots.nth(number).inner_text()
    bars = plots.first.locator("[aria-roledescription=bar]")
    heights = bars.evaluate_all("all => all.map(one => one.getBBox().height)")
    bar = bars.nth(heights.index(max(heights)))
    bar.hover()
    assert opened.inner_text("#tip") == bar.get_attribute("aria-label")


@pytest.mark.parametrize("opened", [{"java_script_enabled": False}], indirect=True)
def test_without_scripts_the_numbers_stay(opened: Any) -> None:
    """Where scripts are off, statistics and plots are there, and it is said that the samples need them."""
    assert opened.locator("figure.plot svg").count() >= 5
    assert "JavaScript" in opened.inner_text("#browser")
