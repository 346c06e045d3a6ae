"""A chapter's slides in a browser, on a lecture room's screen, without a network."""

from __future__ import annotations

import pytest

from instructor import slides

pytestmark = pytest.mark.slow
LOOK = """() => {
  const slide = document.querySelector(".slides section section.present");
  const high = [...slide.querySelectorAll("p, li, pre, img, table, mjx-container")]
    .map(x => x.getBoundingClientRect());
  return {
    title: slide.innerText.slice(0, 60),
    high: slide.scrollHeight, wide: slide.scrollWidth,
    below: Math.max(0, ...high.map(x => x.bottom)),
    right: Math.max(0, ...high.map(x => x.right)),
    size: parseFloat(getComputedStyle(slide).fontSize),
    wrong: slide.querySelectorAll("mjx-merror, [data-mml-node=merror]").length,
    dollars: slide.innerText.includes("$$") || slide.innerText.includes("\\\\frac"),
    last: !deck.availableRoutes().right && !deck.availableRoutes().down
  };
}"""


@pytest.mark.parametrize("chapter", ["04"])
def test_every_slide_is_within_the_page(browser, tmp_path, chapter):
    path = slides.write(slides.sources([chapter])[0], tmp_path / "the slides")
    page = browser.new_page(viewport={"width": 1280, "height": 720})
    said, asked = [], []
    page.on("console", lambda m: said.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(path.as_uri())
    page.wait_for_selector("html[data-ready=yes]", timeout=120_000)
    seen, formulas = (
        [],
        page.evaluate("document.querySelectorAll('mjx-container').length"),
    )
    while True:
        look = page.evaluate(LOOK)
        seen.append(look)
        assert look["high"] <= 720 and look["wide"] <= 1280, look
        assert look["below"] <= 720 and look["right"] <= 1280, look
        assert look["size"] >= 20 and not look["wrong"] and not look["dollars"], look
        if look["last"]:
            break
        page.evaluate("deck.next()")
    assert len(seen) > 50 and formulas > 50
    assert not said
    assert all(url.startswith(("file:", "data:", "blob:")) for url in asked), asked
    page.close()
