"""The site builds without a warning, its links lead somewhere, and no page needs the network."""

import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tests.docs.blocks import PAGES, ROOT

#: Attributes that make a browser fetch something as it shows a page.
FETCHED = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src", "video": "src"}


class Page(HTMLParser):
    """What a page links to, fetches, and can be linked at."""

    def __init__(self, path):
        super().__init__()
        self.links, self.fetched, self.anchors = [], [], set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        told = dict(attributes)
        if "id" in told:
            self.anchors.add(told["id"])
        if tag == "a" and told.get("href"):
            self.links.append(told["href"])
        if told.get(FETCHED.get(tag)):
            self.fetched.append(told[FETCHED[tag]])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site):
    return {path: Page(path) for path in site.rglob("*.html")}


def test_every_page_is_built(site, pages):
    for page in PAGES[1:]:
        name = page.relative_to(ROOT / "docs").with_suffix("")
        target = site / "index.html" if name == Path("index") else site / name / "index.html"
        assert target in pages, page
    for name in ("parameters", "api", "changes"):
        assert site / name / "index.html" in pages


def test_links_and_anchors_lead_somewhere(site, pages):
    shown = {path: page for path, page in pages.items() if path.name != "404.html"}  # its links are absolute
    broken = [(path.name, href) for path, page in shown.items() for href in page.links if not leads(href, path, pages)]
    assert not broken


def leads(href, path, pages):
    """Whether ``href`` on the page at ``path`` has a target in the site; links to elsewhere count as good."""
    parts = urlsplit(href)
    if parts.scheme or parts.netloc:
        return True
    target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
    target = target / "index.html" if target.is_dir() else target
    if target not in pages:
        return target.is_file()
    return not parts.fragment or unquote(parts.fragment) in pages[target].anchors


def test_no_page_needs_the_network(site, pages):
    for path, page in pages.items():
        outside = [where for where in page.fetched if urlsplit(where).netloc]
        assert not outside, (path, outside)
    for path in site.rglob("*.css"):
        assert "url(http" not in path.read_text(encoding="utf-8").replace("'", "").replace('"', "")


def test_links_of_the_readme_exist():
    for word in (ROOT / "README.md").read_text(encoding="utf-8").split("](")[1:]:
        target = word.partition(")")[0].partition("#")[0]
        assert target.startswith("http") or (ROOT / target).exists(), target
