"""A picture of docs/explore/clip.html, for docs/how-ppo-works.md: `python benchmarks/clip_page_picture.py CHROMIUM`.

Needs playwright (`pip install -c constraints.txt playwright`) and the path of a Chromium, or one on PATH.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def main() -> None:
    from playwright.sync_api import FloatRect, sync_playwright

    executable = sys.argv[1] if len(sys.argv) > 1 else shutil.which("chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1060, "height": 760}, color_scheme="light")
        page.goto((DOCS / "explore" / "clip.html").as_uri() + "#ratio=0.62&epsilon=0.2&advantage=1")
        page.locator("#one-says", has_text="wrong way").wait_for()
        box = page.locator(".columns").first.bounding_box()
        assert box is not None
        around = FloatRect(x=box["x"] - 14, y=box["y"] - 10, width=box["width"] + 28, height=box["height"] + 20)
        page.screenshot(path=DOCS / "pictures" / "clip_page.png", clip=around, full_page=True)
        browser.close()


if __name__ == "__main__":
    main()
