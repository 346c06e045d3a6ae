"""The site, built once and opened page by page in a browser, on a phone's screen."""

from __future__ import annotations

import functools
import html
import importlib.util
import json
import re
import subprocess
import sys
import threading
import tomllib
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import nbformat
import pytest

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("site_build", ROOT / "docs" / "build.py")
make = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make)

REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"][
    "kdlib"
]["repository"]
PHONE = {"width": 390, "height": 844}
SMALLEST = 14  # pixels
CHAPTERS = make.contents.chapters()

pytestmark = pytest.mark.slow


def build(out: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "docs" / "build.py"), str(out)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder html/ of a fresh build; its path has a space."""
    out = tmp_path_factory.mktemp("the site")
    done = build(out)
    assert done.returncode == 0, done.stdout + done.stderr
    assert str(out / "html" / "index.html") in done.stdout
    return out / "html"


class Page(HTMLParser):
    """What a page links to, what it loads, and where it can be linked to."""

    def __init__(self, path: Path):
        super().__init__()
        self.links, self.loads, self.ids = [], [], set()
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.ids |= {found[x] for x in ("id", "name") if found.get(x)}
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        elif tag == "link" and found.get("rel") not in ("author", "canonical"):
            self.loads.append(found.get("href"))
        for name in ("src", "srcset", "data", "poster"):
            if found.get(name) and tag != "button":
                self.loads.append(found[name])


@pytest.fixture(scope="module")
def pages(site):
    """Every page, by its place on the site."""
    paths = sorted(p for p in site.rglob("*.html") if "_static" not in p.parts)
    return {path.relative_to(site).as_posix(): Page(path) for path in paths}


def text_of(site: Path, name: str) -> str:
    return (site / name).read_text("utf-8")


# --- What the files say ---


def test_every_chapter_exercise_room_and_result_has_its_page(pages):
    wanted = {f"notebooks/{chapter.name}.html" for chapter in CHAPTERS}
    for source in (ROOT / "exercises" / "src").glob("ch*.py"):
        wanted |= {f"exercises/{x}{source.stem}.html" for x in ("", "solutions/")}
    for path in (ROOT / "kdlib").iterdir():
        if path.suffix == ".py" and not path.stem.startswith("__"):
            wanted.add(f"kdlib/{path.stem}.html")
        elif (path / "__init__.py").exists():
            wanted.add(f"kdlib/{path.name}.html")
    wanted |= {f"docs/{path.stem}.html" for path in (ROOT / "docs").glob("*.md")}
    wanted |= {f"results/{x}.html" for x in ("ledger", "leaderboard", "doctor")}
    for path in (ROOT / "notebooks" / "results").glob("bench_*.json"):
        wanted.add(f"results/{path.stem}.html")
    wanted = (wanted - {"docs/index.html"}) | {"index.html", "search.html"}
    assert wanted <= set(pages), sorted(wanted - set(pages))


def test_every_internal_link_and_anchor_resolves(pages, site):
    broken, checked = [], 0
    for name, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = unquote(urljoin(f"/{name}", parts.path)).lstrip("/") or name
            target = target + "index.html" if target.endswith("/") else target
            checked += 1
            if not (site / target).is_file():
                broken.append(f"{name}: {link}")
            elif parts.fragment and target in pages:
                if unquote(parts.fragment) not in pages[target].ids:
                    broken.append(f"{name}: {link}: no such place")
    assert checked > 1000
    assert not broken, "\n".join(broken)


def test_no_page_loads_anything_from_another_host(pages, site):
    foreign = [
        f"{name}: {source}"
        for name, page in pages.items()
        for source in page.loads
        if source and re.match(r"(?!data:)([a-z]+:)?//", source)
    ]
    for path in site.rglob("*.css"):
        outside = re.findall(
            r"(?:url\(|@import)\s*['\"]?((?:https?:)?//[^'\")]+)",
            path.read_text("utf-8", errors="replace"),
        )
        foreign += [f"{path.name}: {source}" for source in outside]
    assert not foreign, "\n".join(foreign)


def test_notebooks_open_in_colab_and_the_link_names_a_file_that_exists(pages):
    start = f"https://colab.research.google.com/github/{REPOSITORY}/blob/main/"
    for name, page in pages.items():
        if name.startswith(("notebooks/", "exercises/")):
            wanted = name.removesuffix(".html") + ".ipynb"
            found = {link for link in page.links if "colab." in link}
            assert found == {start + wanted}, name
            # The link in the text, and the theme's button.
            assert page.links.count(start + wanted) == 2, name
            assert (ROOT / wanted).is_file()


def test_minutes_stand_on_the_index_and_on_each_chapter(site):
    def rows(name):
        found = re.findall(r"<tr.*?</tr>", text_of(site, name), re.S)
        return [" ".join(re.sub("<[^>]+>", " ", row).split()) for row in found]

    index = rows("index.html")
    for chapter in CHAPTERS:
        mine = rows(f"notebooks/{chapter.name}.html")
        (row,) = [x for x in index if x.startswith(f"{chapter.number} · ")]
        assert f"reading {chapter.reading} minutes" in mine
        assert f" {chapter.reading} min " in row
        assert f"two CPU cores {chapter.run}" in mine
        if chapter.exercises is None:
            assert row.endswith("none")
        else:
            assert f"exercises {chapter.exercises} minutes" in mine
            assert row.endswith(f" {chapter.exercises} min")


def test_the_result_pages_say_what_the_result_files_say(site):
    claims = tomllib.loads((ROOT / "notebooks" / "claims.toml").read_text("utf-8"))
    ledger = text_of(site, "results/ledger.html")
    for name in claims:
        assert f">{name}<" in ledger
    losses = ROOT / "notebooks" / "results" / "laws_peers.json"
    board = text_of(site, "results/leaderboard.html")
    for row in json.loads(losses.read_text("utf-8"))["rows"]:
        verdicts = {"passed": "✓", "failed": "✗", "by_design": "d"}
        marks = [verdicts.get(verdict["status"], "") for verdict in row["verdicts"]]
        loss = re.escape(row["loss"].replace("\N{RIGHT SINGLE QUOTATION MARK}", "'"))
        (line,) = re.findall(rf"<tr[^>]*><td[^>]*><p>{loss}</p>.*?</tr>", board, re.S)
        cells = re.findall(r"<td.*?</td>", line, re.S)[1:]
        assert [re.sub(r"<[^>]+>|\s", "", cell) for cell in cells] == marks


def test_the_reference_shows_the_laws_and_links_types_to_what_they_are(site, pages):
    from kdlib.laws import LAWS

    text = html.unescape(re.sub("<[^>]+>", "", text_of(site, "kdlib/laws.html")))
    text = text.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")  # Sphinx sets it
    for number, law in LAWS.items():
        assert f"Law {number}: {law.title}" in text
    links = pages["kdlib/train.html"].links
    assert "teachers.html#kdlib.teachers.Teacher" in links
    # The annotation Logits is an alias there; onnx_model has a class of that name.
    assert not any("Logits" in link for link in pages["kdlib/divergences.html"].links)


def test_every_explorer_is_shown_as_its_picture_with_words(site):
    shown = 0
    for chapter in CHAPTERS:
        page = html.unescape(text_of(site, f"notebooks/{chapter.name}.html"))
        assert "widget-view" not in page
        book = nbformat.read(ROOT / "notebooks" / f"{chapter.name}.ipynb", as_version=4)
        outputs = [o for c in book.cells for o in c.get("outputs", [])]
        for data in (output.get("data", {}) for output in outputs):
            if "application/vnd.jupyter.widget-view+json" in data:
                words = re.escape(data["text/plain"].strip("<>"))
                assert re.search(rf'<img alt="{words}"[^>]*src="\.\./_images/', page)
                shown += 1
    assert shown >= 5


# --- What a browser shows ---


class Quiet(SimpleHTTPRequestHandler):
    """Without a log; what pages share, MathJax above all, is asked for once."""

    def end_headers(self):
        self.send_header("Cache-Control", "max-age=600")
        super().end_headers()

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def server(site):
    handler = functools.partial(Quiet, directory=str(site))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as found:
        thread = threading.Thread(target=found.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{found.server_port}/"
        found.shutdown()
        thread.join()


# Run in the page, once MathJax has drawn what is on it.
LOOK = """async (smallest) => {
  if (window.MathJax?.startup) await MathJax.startup.promise;
  const article = document.querySelector("article") ?? document.body;
  const formulas = [...article.querySelectorAll(".math")];
  const walker = document.createTreeWalker(article, NodeFilter.SHOW_TEXT);
  const raw = [], small = new Set();
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const inside = node.parentElement;
    const box = inside.getBoundingClientRect();
    if (!node.data.trim() || !box.width) continue;
    if (inside.closest("script, style, .headerlink")) continue;
    if (!inside.closest("pre, code") && /\\$\\$|\\\\[([]|\\\\[a-z]{2}/.test(node.data))
      raw.push(node.data.trim().slice(0, 60));
    if (!inside.closest("mjx-container") &&
        parseFloat(getComputedStyle(inside).fontSize) < smallest)
      small.add(inside.tagName + " " + node.data.trim().slice(0, 40));
  }
  return {
    formulas: formulas.length,
    undrawn: formulas.filter(x => !x.querySelector("mjx-container svg")).length,
    wrong: document.querySelectorAll("[data-mjx-error], mjx-merror").length,
    raw, small: [...small],
    width: document.documentElement.scrollWidth,
    pictures: [...article.querySelectorAll("img")].filter(x => !x.naturalWidth).length,
  };
}"""


@pytest.fixture(scope="module")
def visits(browser, server, pages):
    """Of every page, opened at a phone's width: what went wrong, and what is seen."""
    context = browser.new_context(viewport=PHONE)
    tab, found = context.new_page(), {}
    errors: list[str] = []

    def requested(request):
        if not request.url.startswith((server, "data:", "blob:")):
            errors.append(f"asked for {request.url}")

    def answered(response):
        if response.status >= 400:
            errors.append(f"{response.status} for {response.url}")

    def failed(request):
        if request.failure != "net::ERR_ABORTED":  # by our going on to the next page
            errors.append(f"{request.failure}: {request.url}")

    def said(message):
        if message.type == "error":
            errors.append(message.text)

    tab.on("request", requested)
    tab.on("response", answered)
    tab.on("requestfailed", failed)
    tab.on("console", said)
    tab.on("pageerror", lambda error: errors.append(str(error)))
    for name in pages:
        tab.goto(server + name)
        seen = tab.evaluate(LOOK, SMALLEST)
        found[name] = seen | {"errors": list(errors)}
        errors.clear()
    context.close()
    return found


def those(visits, wrong) -> str:
    """The pages for which `wrong` says something, a line each."""
    lines = {name: wrong(seen) for name, seen in visits.items()}
    return "\n".join(f"{name}: {line}" for name, line in lines.items() if line)


def test_every_page_opens_without_an_error_or_a_foreign_request(visits):
    assert not (found := those(visits, lambda seen: seen["errors"])), found


def test_mathematics_is_drawn(visits):
    assert not (found := those(visits, lambda x: x["undrawn"] or x["wrong"])), found
    assert not (found := those(visits, lambda seen: seen["raw"])), found
    for chapter in CHAPTERS:
        book = nbformat.read(ROOT / "notebooks" / f"{chapter.name}.ipynb", as_version=4)
        texts = [c.source for c in book.cells if c.cell_type == "markdown"]
        displayed = sum(text.count("$$") for text in texts) // 2
        assert visits[f"notebooks/{chapter.name}.html"]["formulas"] >= displayed > 0


def test_a_phone_shows_every_page_without_scrolling_sideways(visits):
    def wide(seen):
        return seen["width"] > PHONE["width"] and f"{seen['width']} pixels wide"

    assert not (found := those(visits, wide)), found


def test_text_is_large_enough_to_read(visits):
    assert not (found := those(visits, lambda seen: seen["small"])), found


def test_every_picture_is_there(visits):
    assert not (found := those(visits, lambda seen: seen["pictures"])), found


@pytest.mark.parametrize(
    ("words", "title"),
    [
        ("exposure bias", "12 · Learning from your own mistakes"),
        ("dark knowledge", "2 · Two distributions"),
        ("micro-batches MFU", "10 · The GPU loop"),
        ("forward_kl", "kdlib.divergences"),
    ],
)
def test_the_search_finds(words, title, browser, server):
    tab = browser.new_page()
    try:
        tab.goto(f"{server}search.html?q={words.replace(' ', '+')}")
        tab.wait_for_selector("#search-results ul.search li a", timeout=20_000)
        tab.wait_for_function("!document.querySelector('#search-progress')?.innerText")
        found = tab.locator("#search-results ul.search > li > a").all_inner_texts()
    finally:
        tab.close()
    assert any(title in text for text in found[:5]), found
    assert not any("Solutions" in text for text in found)
