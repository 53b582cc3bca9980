"""Pages that ``browser.check_layout`` accepts, and pages that it refuses."""

import base64
import io

import pytest

np = pytest.importorskip("numpy")
image = pytest.importorskip("matplotlib.image", reason="pictures are read by matplotlib")

from browser import check_layout, open_page  # noqa: E402


def picture(pixels):
    buffer = io.BytesIO()
    image.imsave(buffer, pixels, format="png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


GRADIENT = picture(np.linspace(0, 1, 64 * 64).reshape(64, 64))
WHITE = picture(np.ones((64, 64, 3)))
LINE = '<div style="width: 900px">a long line of text</div>'

GOOD = {
    "text and a picture": f"<p>text</p><img src='{GRADIENT}'>",
    "a wide table in a box that scrolls": f'<div class="wide" style="overflow-x: auto">{LINE}</div>',
    "a picture that is not displayed": f"<img src='{WHITE}' style='display: none'>",
    "text for screen readers": f'<div style="width:1px;height:1px;overflow:hidden;position:absolute">{LINE}</div>',
    "a drawer that is ignored": f'<div class="drawer" style="position: fixed; left: -950px">{LINE}</div>',
}
BAD = {
    "wider than the screen": (LINE, "from 8 to 908 on a screen of 390"),
    "a box that hides its foot": ('<div style="overflow:hidden;height:9px">one<br>two</div>', "cut off"),
    "a broken picture": ("<img src='none.png' alt='no picture' style='width: 30px; height: 30px'>", "not loaded"),
    "a picture without size": (f"<img src='{GRADIENT}' style='width: 0'>", "empty picture"),
    "a picture of one colour": (f"<img src='{WHITE}'>", "one colour"),
    "a script that fails": ("<script>absent()</script>", "script: absent is not defined"),
    "a request to another host": ("<script src='https://example.org/a.js'></script>", "another host: https://exam"),
}


def page_of(folder, body):
    (folder / "page.html").write_text(f"<!doctype html><meta charset='utf-8'><body>{body}</body>", encoding="utf-8")
    return folder / "page.html"


def test_whole_pages_pass(tmp_path):
    with open_page(page_of(tmp_path, "".join(GOOD.values())), width=390) as page:
        check_layout(page, ignore=".drawer")


@pytest.mark.parametrize("name", BAD)
def test_refused(tmp_path, name):
    body, reason = BAD[name]
    with open_page(page_of(tmp_path, body), width=390) as page, pytest.raises(AssertionError, match=reason):
        check_layout(page)
