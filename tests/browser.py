"""A real headless Chromium for tests: where it is found, and a page that records errors and requests."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from playwright.sync_api import Page, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
LAPTOP = {"width": 1280, "height": 800}
PHONE = {"width": 390, "height": 844}


def find_browser() -> str | None:
    """The path of a browser that playwright can drive, or None where none is installed."""
    return next((path for name in NAMES if (path := shutil.which(name)) is not None), None)


needs_browser = pytest.mark.skipif(
    find_browser() is None, reason=f"no browser: none of {', '.join(NAMES)} is on PATH (apt-get install chromium)"
)


@dataclass
class Recorded:
    """What a page did besides showing itself."""

    console: list[str] = field(default_factory=list)  # errors and warnings
    errors: list[str] = field(default_factory=list)  # exceptions that no script caught
    requests: list[str] = field(default_factory=list)  # addresses that were asked for, the page's own included
    failed: list[str] = field(default_factory=list)  # requests that got no answer, or one from 400 on
    dialogs: list[str] = field(default_factory=list)  # alert, confirm and prompt, which are dismissed


@dataclass(frozen=True)
class Opened:
    """A page and what it did."""

    page: Page
    recorded: Recorded


@contextmanager
def page(scheme: Any = "light", size: dict[str, int] | None = None, **options: Any) -> Iterator[Opened]:
    """A page of a fresh headless browser that is closed in the end.

    Args:
        scheme: the colours that the reader prefers, "light" or "dark".
        size: of the window in px; a laptop's by default.
        options: of playwright's `Browser.new_page`, such as `java_script_enabled`.
    """
    path = find_browser()
    assert path is not None, "a test that opens a page is marked with needs_browser"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        try:
            opened = browser.new_page(viewport=size or LAPTOP, color_scheme=scheme, **options)  # type: ignore[arg-type]
            yield Opened(opened, _record(opened))
        finally:
            browser.close()


def _record(opened: Page) -> Recorded:
    recorded = Recorded()

    def dismiss(dialog: Any) -> None:
        recorded.dialogs.append(dialog.message)
        dialog.dismiss()

    def answered(response: Any) -> None:
        if response.status >= 400:
            recorded.failed.append(f"{response.status} {response.url}")

    opened.on("console", lambda m: recorded.console.append(m.text) if m.type in ("error", "warning") else None)
    opened.on("pageerror", lambda error: recorded.errors.append(str(error)))
    opened.on("request", lambda request: recorded.requests.append(request.url))
    opened.on("requestfailed", lambda request: recorded.failed.append(f"{request.failure} {request.url}"))
    opened.on("response", answered)
    opened.on("dialog", dismiss)
    return recorded
