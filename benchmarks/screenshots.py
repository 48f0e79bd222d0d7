"""Screenshots of a report of `sgacodec eval`, with Chromium: desktop, phone and dark.

python benchmarks/screenshots.py results/report.html docs/images/
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright

SIZES = {"desktop": (1280, 900, "light"), "phone": (390, 844, "light"), "dark": (1280, 900, "dark")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("report", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--whole", action="store_true", help="the whole page, not the view of pictures")
    arguments = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for name, (width, height, scheme) in SIZES.items():
            page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
            page.on("console", lambda message: print(message.text))
            page.goto(arguments.report.resolve().as_uri())
            page.locator("#pair").scroll_into_view_if_needed()
            page.evaluate("document.querySelector('.controls').scrollIntoView()")
            page.evaluate("Promise.all([over.decode(), under.decode()])")
            page.screenshot(path=arguments.out / f"report-{name}.png", full_page=arguments.whole)
            page.close()
        browser.close()


if __name__ == "__main__":
    main()
