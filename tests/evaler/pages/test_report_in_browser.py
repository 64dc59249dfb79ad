"""The page in a real browser: Chromium, driven by Playwright; its links and filters are clicked."""

import base64
import os
import shutil
from pathlib import Path

import cv2
import pytest

from evaler.pages import report_page
from tests.small_run import photograph

pytestmark = pytest.mark.browser
PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
HOSTILE = '<img src=x onerror="document.title=1"> & 100%'
RIGHT = {"E": ["easy"], "M": ["easy", "hard"], "H": ["hard"]}
IGNORED = {"E": ["junk", "hard"], "M": ["junk"], "H": ["junk", "easy"]}
SETTINGS = {"E": "Easy", "M": "Medium", "H": "Hard"}


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="NOT CHECKED IN A BROWSER: needs playwright (requirements-dev.txt)"
    )
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, PROGRAMS)), None)
    with playwright.sync_playwright() as driver:
        if not found and not Path(driver.chromium.executable_path).exists():
            pytest.skip("NOT CHECKED IN A BROWSER: needs Chromium; install it, or run `playwright install chromium`")
        try:
            # Within a container Chromium cannot make the sandbox of its own; the page is ours.
            started = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        except playwright.Error as error:
            reason = str(error).split("\n", 1)[0]
            pytest.skip(f"NOT CHECKED IN A BROWSER: {found or 'Chromium'} does not start: {reason}")
        yield started
        started.close()


@pytest.fixture
def opened(browser, tmp_path):
    """A function that opens the page of some content. What it asked for, and its errors, are looked at in the end."""
    asked, errors = [], []
    context = browser.new_context(viewport={"width": 1280, "height": 900})

    def open_page(content):
        path = tmp_path / "page.html"
        path.write_bytes(report_page.page_bytes(content))
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.goto(path.as_uri())
        return page

    yield open_page
    context.close()
    assert errors == []
    assert asked and all(url.startswith(("file:", "blob:", "data:")) for url in asked), asked


def encoded(seed, kind=".jpg", width=120, height=90):
    return base64.b64encode(cv2.imencode(kind, photograph(seed, height, width))[1].tobytes()).decode()


def revisited(count=70, top=20, runs=1):
    """The content of a page. Query 0 is the worst; even ones begin with a wrong image; the last has nothing easy."""
    labels = ["easy", "junk", "hard", "negative"] * (top // 4)

    def of_run(query, run):
        ap = 100 * ((query + 3 * run) % count) / (count - 1)
        own = labels if query % 2 else ["negative", *labels[1:]]
        last = query == count - 1
        return {
            "found": [[query * 3 + place, round(0.9 - place / 100, 4), label] for place, label in enumerate(own)],
            "missed": [[5, 40, "easy"], [6, 99, "hard"]] if query < 3 else [],
            "later": 2 if query < 3 else 0,
            "ranks": {"E": [] if last else [0, 4], "M": [0, 2, 40], "H": [1]},
            "aps": {"E": None if last else ap, "M": ap, "H": 50.0},
        }

    row = {"values": [[50.0, 1.0, 2.0, 3.0]] * runs, "published": None, "counted": count, "difference": None}
    heat = encoded(1, ".png", 8, 6)
    return {
        "title": "some set",
        "counts": f"{count} queries",
        "settings": [
            {"key": key, "name": name, "right": RIGHT[key], "ignored": IGNORED[key]} for key, name in SETTINGS.items()
        ],
        "runs": [
            {"name": f"run {i}", "card": {"set": "some", "dim": 512 - i}, "line": f"x | {i}"} for i in range(runs)
        ],
        "table": {"columns": ["mAP", "mP@1", "mP@5", "mP@10"], "rows": [row | {"name": n} for n in SETTINGS.values()]},
        "curves": [{key: [1 - i / 200 for i in range(101)] for key in SETTINGS}] * runs,
        "images": [[f"image {i}", encoded(i)] for i in range(count * 3 + top)],
        "queries": [
            {
                "name": f"query {i:02d}" if i else HOSTILE,
                "photo": encoded(i),
                "heat": [heat] * runs,
                "runs": [of_run(i, run) for run in range(runs)],
            }
            for i in range(count)
        ],
        "notes": ["a note"],
    }


def own_folder(count=12):
    content = revisited(count) | {"settings": [], "table": None, "curves": [{}], "notes": []}
    content["images"][0][1] = None
    for place, query in enumerate(content["queries"]):
        found = [[image, score - place / 100, ""] for image, score, _ in query["runs"][0]["found"]]
        query |= {"runs": [{"found": found, "missed": [], "later": 0, "ranks": {}, "aps": {}}], "heat": []}
    return content


def order_of(page):
    return page.locator(".query").evaluate_all("blocks => blocks.map(block => block.dataset.name)")


def wait_for(page, expression):
    """Playwright's own way evaluates text within the page, which the page forbids."""
    for _ in range(100):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(50)
    raise AssertionError(expression)


def top_of(name):
    """Right below the tools, which stay on top: 8rem."""
    return f"Math.abs(document.querySelector('[data-name=\"{name}\"]')?.getBoundingClientRect().top - 128) < 5"


def names_of(count):
    return [HOSTILE, *(f"query {i:02d}" for i in range(1, count))]


def test_the_filters_and_orders(opened):
    page, names = opened(revisited()), names_of(70)
    assert order_of(page) == names and page.title() == "some set – retrieval report"
    page.select_option("#order", "best")
    assert order_of(page) == names[::-1]
    page.select_option("#order", "worst")
    assert order_of(page) == names
    page.click("#settings label:has-text('Easy')")
    assert page.locator("#legend").inner_text().startswith("E easy (right)")
    assert order_of(page) == names
    page.select_option("#order", "best")
    assert order_of(page) == [*names[68::-1], names[69]]  # for the last nothing is right: it has no place
    page.select_option("#only", "counted")
    assert page.locator("#count").inner_text() == "69 of 70 queries" and order_of(page) == names[68::-1]
    page.select_option("#only", "wrong")
    assert order_of(page) == names[68::-2]
    page.select_option("#only", "missed")
    assert order_of(page) == names[2::-1]
    page.select_option("#only", "all")
    page.fill("#filter", "QUERY 1")
    assert sorted(order_of(page)) == names[10:20]
    page.fill("#filter", "none such")
    assert order_of(page) == [] and "No query is like that" in page.locator("#list").inner_text()


def test_pictures_frames_and_the_attention(opened):
    page = opened(revisited())
    block = page.locator(".query").first
    block.scroll_into_view_if_needed()
    assert block.locator("h3").inner_text() == HOSTILE  # text, and not a tag
    frames = block.locator(".results").first.locator("figure")
    classes = frames.evaluate_all("all => all.map(one => one.className.split(' ')[0])")
    assert len(classes) == 20 and classes[:4] == ["negative", "junk", "hard", "negative"]
    colours = [frames.nth(i).evaluate("one => getComputedStyle(one).borderTopColor") for i in (0, 1, 2, 4)]
    assert len(set(colours)) == 4
    assert frames.nth(1).evaluate("one => getComputedStyle(one).opacity") < "1"  # junk does not count
    wait_for(page, "document.querySelector('.results img').naturalWidth === 120")
    further = block.locator(".further figcaption")
    assert [text.split() for text in further.all_inner_texts()] == [["41", "E"], ["100", "H"]]
    heat = block.locator("img.heat")
    assert not heat.is_visible()
    page.check("#heat")
    assert heat.is_visible() and heat.bounding_box() == block.locator("img.own").bounding_box()
    page.uncheck("#ignored")
    assert frames.nth(0).is_visible() and not frames.nth(1).is_visible() and frames.nth(4).is_visible()
    page.click("#settings label:has-text('Hard')")
    assert not frames.nth(4).is_visible()  # an easy image, which Hard ignores
    assert block.locator(".head").first.inner_text().startswith("AP 50.00")


def test_the_viewer_and_the_links(opened):
    page = opened(revisited())
    page.locator(".query").first.locator(".results button").nth(1).click()
    told = page.locator("#told")
    assert told.inner_text() == "rank 2, similarity 0.8900: junk"
    page.keyboard.press("ArrowRight")
    assert told.inner_text().startswith("rank 3, ")
    page.click("#previous")
    page.click("#previous")
    assert told.inner_text().startswith("rank 1, ") and page.locator("#previous").is_disabled()
    page.click("#close")
    assert not page.locator("#viewer").is_visible()
    page.locator(".query").first.locator(".further button").nth(1).click()
    assert told.inner_text() == "rank 100: hard" and page.locator("#next").is_disabled()
    page.keyboard.press("Escape")
    # A bar of the chart leads to its query, also if a filter hides it.
    page.fill("#filter", "query 01")
    page.locator("#curves a").nth(60).click()
    wait_for(page, top_of("query 60"))
    assert page.locator("[data-name='query 60'] figure").count() == 20 and page.input_value("#filter") == ""
    assert page.evaluate("location.hash") == "#query-query%2060"
    for name in ("scores", "curves", "queries"):
        page.click(f"nav a[href='#{name}']")
        assert page.evaluate("location.hash") == f"#{name}"
    page.click("#card summary")
    assert page.locator("#card code").inner_text() == "x | 0"
    page.goto(page.url.split("#")[0] + "#query-query%2042")
    page.reload()
    wait_for(page, top_of("query 42"))


def test_two_runs(opened):
    page, names = opened(revisited(count=10, runs=2)), names_of(10)
    page.select_option("#order", "loss")
    assert sorted(order_of(page)[:3]) == names[-3:]  # (i + 3) % 10 is less than i
    page.select_option("#order", "gain")
    assert sorted(order_of(page)[-3:]) == names[-3:]
    block = page.locator(".query").first
    block.scroll_into_view_if_needed()
    one, other = (block.locator(".of-run").nth(i).bounding_box() for i in (0, 1))
    assert one["y"] == other["y"] and one["x"] + one["width"] <= other["x"]
    assert page.locator("#table tbody tr").count() == 6 and page.locator("#curves circle").count() == 10
    page.click("#card summary")
    assert page.locator("#card tr.differs th").all_inner_texts() == ["dim"]


def test_a_folder_without_labels(opened):
    page = opened(own_folder())
    for unused in ("#settings", "#only", "#ignored", "#heat", "#table"):
        assert not page.locator(unused).is_visible()
    block = page.locator(".query").first
    block.scroll_into_view_if_needed()
    assert block.locator("figure").count() == 20
    assert block.locator("figure").first.inner_text().split("\n")[0] == "image 0"  # which has no picture
    assert "Similarity of the first result" in page.locator("#curves").inner_text()
    page.select_option("#order", "worst")
    assert order_of(page)[0] == "query 11"


@pytest.mark.parametrize("width", [390, 1600])
@pytest.mark.parametrize("content", [revisited(count=6, runs=2), own_folder()], ids=["two runs", "own folder"])
def test_nothing_is_wider_than_the_window(opened, content, width):
    page = opened(content)
    page.set_viewport_size({"width": width, "height": 800})
    page.locator(".query").last.scroll_into_view_if_needed()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
