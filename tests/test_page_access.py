"""The page for everybody: names for every control, an order for the keyboard, contrast, small windows, less motion."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from browsing import Visitor, needs_browser, open_browser, visiting
from playwright.sync_api import Browser, expect
from toy_service_models import ToyTeacher, open_gate, picture, running, serving, toy_served

from services.app import create_app
from services.settings import Settings

pytestmark = needs_browser

CONTRAST = """() => {
    const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
    const over = (colour, under) => {
        canvas.fillStyle = under; canvas.fillRect(0, 0, 1, 1);
        canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
        return [...canvas.getImageData(0, 0, 1, 1).data];
    };
    const shown = (rgb) => `rgb(${rgb.slice(0, 3).join(",")})`;
    const light = (rgb) => {
        const parts = rgb.slice(0, 3).map((one) => one / 255);
        const [r, g, b] = parts.map((one) => one <= 0.04045 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const under = (element) => {
        const behind = element.parentElement ? under(element.parentElement) : "rgb(255,255,255)";
        return shown(over(getComputedStyle(element).backgroundColor, behind));
    };
    const ratio = (one, other) => {
        const [low, high] = [light(one), light(other)].sort((a, b) => a - b);
        return (high + 0.05) / (low + 0.05);
    };
    const found = [];
    for (const element of document.body.querySelectorAll("*")) {
        const texts = [...element.childNodes].filter((node) => node.nodeType === 3);
        const own = texts.map((node) => node.data.trim()).join("");
        if (!own || element.closest("noscript, .unseen") || !element.getClientRects().length) continue;
        const behind = under(element);
        const front = over(getComputedStyle(element).color, behind);
        found.push([own.slice(0, 40), ratio(front, over(behind, behind))]);
    }
    return found;
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One for this module."""
    with open_browser() as found:
        yield found


@pytest.fixture(scope="module")
def base() -> Iterator[str]:
    """A service with two teachers and no keys."""
    served = {name: toy_served(open_gate(ToyTeacher()), name=name) for name in ("first", "second")}
    with running(create_app(served, Settings())) as url:
        yield url


@pytest.fixture(scope="module")
def locked() -> Iterator[str]:
    """A service with a key."""
    with serving(toy_served(open_gate(ToyTeacher())), api_key="secret") as client:
        yield str(client.base_url).rstrip("/")


def try_image(visitor: Visitor) -> None:
    """An answer and a problem are on the page."""
    visitor.choose(picture("PNG"))
    expect(visitor.page.locator("#result")).to_be_visible()
    expect(visitor.page.locator("#spark svg")).to_be_visible()


def controls(visitor: Visitor) -> list[tuple[str, str, str]]:
    """Role, name and description of everything that can be operated, as assistive technology is told."""
    session = visitor.page.context.new_cdp_session(visitor.page)
    session.send("Accessibility.enable")
    nodes: list[dict[str, Any]] = session.send("Accessibility.getFullAXTree")["nodes"]

    def text(node: dict[str, Any], part: str) -> str:
        return str(node.get(part, {}).get("value", ""))

    focusable = [
        node
        for node in nodes
        if not node.get("ignored")
        and any(one["name"] == "focusable" and one["value"]["value"] for one in node.get("properties", ()))
    ]
    return [(text(node, "role"), text(node, "name"), text(node, "description")) for node in focusable]


def test_every_control_has_a_name_and_a_role(browser: Browser, base: str) -> None:
    with visiting(browser, base) as visitor:
        try_image(visitor)
        found = {(role, name): description for role, name, description in controls(visitor)}
        assert found.keys() >= {
            ("combobox", "Teacher"),
            ("button", "Choose another"),
            ("slider", "Temperature"),
            ("DisclosureTriangle", "7 classes"),
            ("heading", "first"),
        }
        assert all(name for role, name in found if role != "option"), found
        assert found["slider", "Temperature"].startswith("Higher is softer.")
        assert "8 × 8 pixels" in found["button", "Choose another"]
        headings = visitor.page.locator("h1:visible, h2:visible, h3:visible")
        levels = headings.evaluate_all("all => all.map(one => Number(one.localName[1]))")
        assert levels == [1, 2, 3, 2, 2, 3]
        landmarks = visitor.page.get_by_role("main").get_by_role("region")
        assert landmarks.count() == 3
        for image in visitor.page.locator("img:visible").all():
            assert image.get_attribute("alt")


def test_the_key_has_a_label_and_says_what_becomes_of_it(browser: Browser, locked: str) -> None:
    with visiting(browser, locked, refused=(401,)) as visitor:
        expect(visitor.page.get_by_label("Key", exact=True)).to_be_focused()
        found = {(role, name): description for role, name, description in controls(visitor)}
        assert "in the memory of this page" in found["textbox", "Key"]
        assert visitor.page.locator("#key").get_attribute("type") == "password"
        visitor.press("Tab")
        assert visitor.page.evaluate("document.activeElement.textContent") == "Enter"


def test_tab_goes_down_the_page_and_shows_where_it_is(browser: Browser, base: str) -> None:
    with visiting(browser, base) as visitor:
        try_image(visitor)
        reached, marked = [], []
        visitor.page.evaluate("document.activeElement.blur()")
        for _ in range(4):
            visitor.press("Tab")
            reached.append(visitor.focused)
            marked.append(
                visitor.page.evaluate(
                    """() => {
                        const one = document.activeElement;
                        const seen = one.id === "file" ? one.nextElementSibling : one;
                        return one.id === "temperature" || getComputedStyle(seen).outlineStyle === "solid";
                    }"""
                )
            )
        assert reached == ["teacher", "file", "temperature", "summary"]
        assert all(marked)
        visitor.press("Enter")
        expect(visitor.page.locator("details")).to_have_attribute("open", "")
        visitor.press("Shift+Tab")
        assert visitor.focused == "temperature"
        focus = visitor.page.locator("#temperature").bounding_box()
        assert focus is not None
        before = visitor.page.screenshot(clip={**focus})
        visitor.page.evaluate("document.activeElement.blur()")
        assert visitor.page.screenshot(clip={**focus}) != before, "the slider shows that it has the focus"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_stands_out(browser: Browser, base: str, locked: str, scheme: str) -> None:
    with visiting(browser, base, color_scheme=scheme, refused=(422,)) as visitor:
        try_image(visitor)
        found = visitor.page.evaluate(CONTRAST)
        visitor.choose(picture("PNG")[:50])
        expect(visitor.page.locator("#trial-trouble .problem")).to_be_visible()
        found += visitor.page.evaluate(CONTRAST)
        paper = visitor.page.evaluate("getComputedStyle(document.body).backgroundColor")
    with visiting(browser, locked, color_scheme=scheme, refused=(401,)) as visitor:
        expect(visitor.page.locator("#door")).to_be_visible()
        found += visitor.page.evaluate(CONTRAST)
    assert len(found) > 60
    assert {text for text, ratio in found if ratio < 4.5} == set()
    channels = [int(part) for part in paper.removeprefix("rgb(").removesuffix(")").split(",")]
    assert (max(channels) < 60) == (scheme == "dark")


@pytest.mark.parametrize("width", [320, 560, 1100])
def test_nothing_is_cut_off_in_a_small_window(browser: Browser, base: str, width: int) -> None:
    with visiting(browser, base, viewport={"width": width, "height": 700}) as visitor:
        try_image(visitor)
        visitor.page.locator("summary").click()
        assert visitor.page.evaluate("document.scrollingElement.scrollWidth") <= width
        wide = visitor.page.locator("main *:visible").evaluate_all(
            "all => all.filter(one => one.scrollWidth > one.clientWidth + 1 && !one.closest('.unseen')"
            " && getComputedStyle(one).overflow === 'hidden').map(one => one.id || one.className)"
        )
        assert wide == []
        small = visitor.page.locator("button:visible, .button:visible, select:visible, input[type=range]:visible")
        assert all(height >= 24 for height in small.evaluate_all("all => all.map(one => one.offsetHeight)"))


@pytest.mark.parametrize("wish", ["reduce", "no-preference"])
def test_bars_move_only_where_motion_is_welcome(browser: Browser, base: str, wish: str) -> None:
    with visiting(browser, base, reduced_motion=wish) as visitor:
        try_image(visitor)
        duration = "one => getComputedStyle(one).transitionDuration"
        found = visitor.page.locator("#classes .fill").first.evaluate(duration)
        assert (found == "0s") == (wish == "reduce")


def test_without_a_script_the_page_says_where_to_ask(browser: Browser, base: str) -> None:
    with visiting(browser, base, java_script_enabled=False) as visitor:
        expect(visitor.page.locator("noscript p")).to_be_visible()
        expect(visitor.page.locator("noscript code")).to_be_visible()
