"""The site: it builds without a warning, every link in it leads somewhere, and nothing is fetched when it is read."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site. No proxy would be found, and none is needed."""
    directory = tmp_path_factory.mktemp("site")
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "mkdocs",
            "build",
            "--strict",
            "--site-dir",
            directory,
        ],  # --quiet would hide warnings from --strict
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "https_proxy": "http://localhost:9", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "WARNING" not in result.stderr
    return directory


class Page(HTMLParser):
    """What a page links to, what a browser would fetch for it, and the places within it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.places: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Notes what an element links to, or has a browser fetch."""
        values = {name: value for name, value in attrs if value}
        self.places.update(values[name] for name in ("id", "name") if name in values)
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        elif tag == "link" and values.get("rel") != "canonical" and "href" in values:
            self.fetched.append(values["href"])
        elif "src" in values:
            self.fetched.append(values["src"])


def test_the_site_builds_without_a_warning(site: Path) -> None:
    """Warnings are errors, and every page of `docs` is in the site."""
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")}

    assert pages <= {path.stem for path in site.glob("*.html")}
    assert (site / "search" / "search_index.json").is_file()


def test_nothing_is_fetched_and_no_link_is_dead(site: Path) -> None:
    """Scripts, styles and pictures are files of the site; so is whatever a link within it names, with its place."""
    pages = {path: Page(path) for path in site.rglob("*.html")}
    num_links = 0
    for path, page in pages.items():
        for address in [*page.links, *page.fetched]:
            parts = urlsplit(address)
            if parts.scheme in ("http", "https"):
                assert address in page.links, f"{path.name} fetches {address}"
                continue
            if path.name == "404.html" or parts.scheme in ("mailto", "data"):
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            assert target.exists(), f"{path.name} links to {address}"
            if parts.fragment and target in pages and parts.fragment not in ("__codelineno-0-1",):
                assert unquote(parts.fragment) in pages[target].places, f"{path.name} links to {address}"
            num_links += 1

    assert num_links > 300


def test_styles_and_scripts_fetch_nothing(site: Path) -> None:
    """No style sheet imports from elsewhere, and no page has a script from elsewhere."""
    for path in site.rglob("*.css"):
        assert not re.findall(r"(?:@import|url\()\s*[\"']?https?://", path.read_text("utf-8")), path.name


def test_public_names_are_in_the_reference(site: Path) -> None:
    """Every name that `import sft_fast` brings has its place on the page of the API."""
    import sft_fast

    places = Page(site / "api.html").places
    missing = [name for name in sft_fast.__all__ if not any(place.endswith(f".{name}") for place in places)]

    assert missing == ["__version__"]
