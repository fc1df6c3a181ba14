"""A real browser without a window, and a visitor who notices what should not be."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, Request, expect, sync_playwright

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium (Debian: apt-get install chromium)")

_QUIET = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@contextmanager
def open_browser() -> Iterator[Browser]:
    """Chromium with an empty profile that speaks to nobody of its own accord."""
    expect.set_options(timeout=10_000)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(_QUIET))
        yield browser
        browser.close()


@dataclass
class Visitor:
    """One tab, with all that it asked for and all that went wrong in it."""

    page: Page
    base: str
    requests: list[Request] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    """Errors and warnings of the console, and what no script caught."""

    def asked(self, part: str) -> list[Request]:
        """The requests whose URL has this part."""
        return [request for request in self.requests if part in request.url]

    def press(self, key: str, times: int = 1) -> None:
        """A key of the keyboard."""
        for _ in range(times):
            self.page.keyboard.press(key)

    @property
    def focused(self) -> str:
        """The id of what has the focus; the name of its element where it has none."""
        found: str = self.page.evaluate("document.activeElement.id || document.activeElement.localName")
        return found

    def tab_to(self, wanted: str) -> None:
        """Presses Tab until something has the focus."""
        seen = []
        for _ in range(30):
            self.press("Tab")
            seen.append(self.focused)
            if seen[-1] == wanted:
                return
        pytest.fail(f"Tab does not reach {wanted}: {seen}")

    def choose(self, content: bytes, name: str = "image.png", kind: str = "image/png") -> None:
        """Chooses a file, as the dialog would."""
        self.page.set_input_files("#file", {"name": name, "mimeType": kind, "buffer": content})

    def target(self) -> dict[str, float]:
        """The soft target that is shown: probabilities by name, in the order of the page."""
        script = "list => [...list.children].map(row => [row.children[0].textContent, Number(row.children[1].value)])"
        return dict(self.page.locator("#classes").evaluate(script))

    def entropy(self) -> list[float]:
        """In bits: one number, or the lowest and the highest that it can be."""
        found: list[float] = self.page.locator("#entropy data").evaluate_all("all => all.map(one => Number(one.value))")
        return found

    def facts(self, part: str) -> dict[str, str]:
        """A list of terms and what they are."""
        script = "list => [...list.children].map(row => [...row.children].map(one => one.textContent))"
        return dict(self.page.locator(part).evaluate(script))


@contextmanager
def visiting(browser: Browser, base: str, *, refused: tuple[int, ...] = (), **options: Any) -> Iterator[Visitor]:
    """Opens the page at `/` in a context of its own; fails where it did what a good page does not do.

    Args:
        browser: an open one.
        base: the server's root, without the slash.
        refused: status codes that the service is expected to answer; a browser complains of each.
        options: of the context.
    """
    context = browser.new_context(**options)
    visitor = Visitor(context.new_page(), base)

    def hears(message: ConsoleMessage) -> None:
        expected = any(f"the server responded with a status of {status} " in message.text for status in refused)
        if message.type in ("error", "warning") and not expected:
            visitor.complaints.append(message.text)

    visitor.page.on("console", hears)
    visitor.page.on("pageerror", lambda error: visitor.complaints.append(str(error)))
    # Dialogs are caught from the first listener on, and a key that follows at once would come before that.
    visitor.page.on("filechooser", lambda _chooser: None)
    visitor.page.on("request", lambda request: visitor.requests.append(request))
    try:
        visitor.page.goto(f"{base}/")
        yield visitor
        assert visitor.complaints == []
        elsewhere = [one.url for one in visitor.requests if not one.url.startswith((f"{base}/", "blob:", "data:"))]
        assert elsewhere == []
    finally:
        context.close()
