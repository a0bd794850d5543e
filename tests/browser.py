"""A real browser for pages: headless Chromium, driven by Playwright.

`make test` installs it where it can. Elsewhere tests that need it are skipped with what to install, but for
CI, where they fail: nothing may pass there unseen.
"""

import os
import shutil

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
MISSING = "no Chromium found: install it (Debian: apt-get install chromium) to run the tests of pages"


@pytest.fixture(scope="module")
def chromium():
    """A running browser. For a module at a time: while it runs, no other event loop can in this thread."""
    from playwright.sync_api import sync_playwright

    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        assert not os.environ.get("CI"), MISSING
        pytest.skip(MISSING)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium):
    """``visit(path, width=, dark=) -> page``: opened, with its complaints and requests in ``page.said`` and
    ``page.asked``.
    """
    contexts = []

    def opened(path, width=1100, dark=False):
        context = chromium.new_context(
            viewport={"width": width, "height": 800}, color_scheme="dark" if dark else "light"
        )
        contexts.append(context)
        page = context.new_page()
        page.said, page.asked = [], []
        page.on("console", lambda message: page.said.append(message.text))
        page.on("pageerror", lambda error: page.said.append(str(error)))
        page.on("request", lambda request: page.asked.append(request.url))
        page.goto(path.as_uri())
        return page

    yield opened
    for context in contexts:
        context.close()
