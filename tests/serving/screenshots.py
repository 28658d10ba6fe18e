"""A picture of the web page for the documents: a desk in daylight beside a phone at night, both asking a real server.

python -m tests.serving.screenshots http://127.0.0.1:8000/ docs/page.png
"""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

from PIL import Image

from tests.serving.browser import open_browser

DESK = {"viewport": {"width": 1080, "height": 760}, "color_scheme": "light"}
PHONE = {"viewport": {"width": 360, "height": 760}, "color_scheme": "dark", "is_mobile": True, "has_touch": True}
GAP = 24


def shot(browser: Any, url: str, samples: list[int], options: dict[str, Any]) -> Image.Image:
    """The page after some of its samples were asked about, the last of them only chosen."""
    context = browser.new_context(**options)
    page = context.new_page()
    page.goto(url)
    for number, sample in enumerate(samples, 1):
        page.locator(".sample").nth(sample).wait_for(state="attached")
        page.locator(".sample").nth(sample).dispatch_event("click")
        page.wait_for_selector(".strip .medium")
        if number < len(samples):
            page.click("#send")
            page.wait_for_selector(f".exchange:nth-child({number}) .stats:not(:empty)")
    page.wait_for_timeout(1500)  # the controls of a video fade in
    page.mouse.move(0, 0)
    page.evaluate("""Promise.all([...document.querySelectorAll("video")].map((one) => one.readyState > 2 ||
        new Promise((done) => one.addEventListener("canplay", done))))""")
    picture = Image.open(io.BytesIO(page.screenshot()))
    context.close()
    return picture


def main(url: str, path: Path) -> None:
    """Write the picture."""
    with open_browser() as browser:
        shots = [shot(browser, url, [0, 2, 1], DESK), shot(browser, url, [2, 0], PHONE)]
    width = sum(one.width for one in shots) + GAP * (len(shots) + 1)
    sheet = Image.new("RGB", (width, max(one.height for one in shots) + 2 * GAP), "#d9d6cf")
    left = GAP
    for one in shots:
        sheet.paste(one, (left, GAP))
        left += one.width + GAP
    sheet.quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
