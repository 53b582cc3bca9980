"""Pages in a real browser: the system's Chromium, driven by playwright, without a network.

``with open_page(path_or_url, width=390) as page: check_layout(page)``. Skips where there is no Chromium or no
playwright; with ``SELFSUP_KERNELS_REQUIRE_BROWSER=1`` that is an error.
"""

import atexit
import contextlib
import functools
import importlib.util
import io
import os
import shutil
from pathlib import Path
from urllib.parse import urlsplit

import pytest

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
ARGUMENTS += ["--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"]
LOCAL = ("localhost", "127.0.0.1", "[::1]", "::1")

# What sticks out of the screen, or of a box that hides the rest. A box that scrolls may hold anything; a box of one
# pixel is how text for screen readers is hidden.
CUT_OFF = """(ignored) => {
  const width = document.documentElement.clientWidth, found = [];
  const overflow = (e) => getComputedStyle(e).overflowX, named = (e) => e.outerHTML.slice(0, 80);
  const free = (e) => e && e !== document.body && (overflow(e) === "auto" || overflow(e) === "scroll" ||
                                                  e.clientWidth === 1 || free(e.parentElement));
  for (const e of document.body.querySelectorAll("*")) {
    const box = e.getBoundingClientRect();
    if (getComputedStyle(e).visibility === "hidden" || box.width <= 1 || (ignored && e.closest(ignored))) continue;
    if (!free(e.parentElement) && (box.right > width + 1 || box.left < -1))
      found.push("from " + Math.round(box.left) + " to " + Math.round(box.right) + " on a screen of " + width + ": " +
                 named(e));
    if (["hidden", "clip"].includes(overflow(e)) && e.clientWidth > 1 &&
        (e.scrollWidth > e.clientWidth + 1 || e.scrollHeight > e.clientHeight + 1)) found.push("cut off: " + named(e));
  }
  return found;
}"""

# Whether a picture, drawn small, has more than one colour.
VARIED = """(picture) => {
  const context = document.createElement("canvas").getContext("2d");
  context.drawImage(picture, 0, 0, 300, 150);
  const pixels = new Uint32Array(context.getImageData(0, 0, 300, 150).data.buffer);
  return pixels.some((pixel) => pixel !== pixels[0]);
}"""


def chromium():
    """Return the browser's path, or skip the test."""
    path = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if path is None or importlib.util.find_spec("playwright") is None:
        required = os.environ.get("SELFSUP_KERNELS_REQUIRE_BROWSER") == "1"
        (pytest.fail if required else pytest.skip)("expected Chromium on PATH and playwright")
    return path


def _is_local(url):
    parts = urlsplit(url)
    return parts.scheme in ("file", "data", "blob", "about") or parts.hostname in LOCAL


@functools.cache
def browser():
    """Start the browser that all tests of this process share; return its playwright object."""
    executable = chromium()
    from playwright.sync_api import sync_playwright

    playwright = sync_playwright().start()
    atexit.register(playwright.stop)
    return playwright.chromium.launch(executable_path=executable, args=ARGUMENTS)


@contextlib.contextmanager
def open_page(target, width=1280, height=900, scheme="light"):
    """Yield a playwright page that shows ``target``, a path or a URL, on a screen of ``width`` pixels, light or dark.

    ``page.complaints`` collects errors of the console and of scripts, requests that failed, and requests to other
    hosts, which are not let through. ``check_layout`` reads it.
    """
    url = str(target) if "://" in str(target) else Path(target).resolve().as_uri()
    page = browser().new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
    page.complaints = []

    def refuse(route):
        page.complaints.append(f"request to another host: {route.request.url}")
        route.abort()

    try:
        page.route(lambda address: not _is_local(address), refuse)
        page.on("requestfailed", lambda request: page.complaints.append(f"not loaded: {request.url}"))
        page.on("console", lambda m: page.complaints.append(f"console: {m.text}") if m.type == "error" else None)
        page.on("pageerror", lambda error: page.complaints.append(f"script: {error}"))
        page.goto(url)
        yield page
    finally:
        page.close()


def check_layout(page, ignore=""):
    """Assert that the page is whole.

    Nothing is wider than the screen or cut off, but for what lies in a box that scrolls; every visible picture has
    loaded and has more than one colour; nothing was logged as an error; no request left the machine.

    Args:
        page: from ``open_page``.
        ignore: a CSS selector of elements that lie off the screen on purpose, such as closed drawers.
    """
    from matplotlib.image import imread

    for picture in page.query_selector_all("img"):
        source = picture.get_attribute("src") or "no src"
        if not picture.is_visible():
            assert picture.bounding_box() is None, f"empty picture: {source[:100]}"  # None: not displayed at all
            continue
        loaded = "e => { e.loading = 'eager'; return e.decode().then(() => true, () => false); }"
        assert picture.evaluate(loaded), f"not loaded: {source[:100]}"
        if source.startswith("data:"):
            varied = picture.evaluate(VARIED)
        else:  # a page opened from a file may not read the pixels of another file
            pixels = imread(io.BytesIO(picture.screenshot()), format="png")
            varied = pixels.reshape(-1, pixels.shape[-1]).std(axis=0).max() > 0
        assert varied, f"one colour: {source[:100]}"
    cut = page.evaluate(CUT_OFF, ignore)
    assert not cut, "\n".join(cut[:10])
    assert not page.complaints, "\n".join(page.complaints)


def check_report(path):
    """Assert that a report is whole on a phone and on a desktop, light and dark, with three numbers on a phone's
    first screen."""
    seen = []
    for scheme in ("light", "dark"):
        with open_page(path, width=390, height=844, scheme=scheme) as page:
            check_layout(page)
            boxes = [number.bounding_box() for number in page.query_selector_all(".numbers dd")]
            assert len(boxes) == 3
            assert all(box["y"] + box["height"] < 844 for box in boxes)
            assert page.evaluate("document.documentElement.scrollWidth") == 390
            colors = page.evaluate("(s => [s.backgroundColor, s.color])(getComputedStyle(document.body))")
            seen.append([*colors, *page.evaluate("[...document.images].map(e => e.currentSrc)")])
            page.set_viewport_size({"width": 1280, "height": 800})
            check_layout(page)
    assert all(light != dark for light, dark in zip(*seen, strict=True))
