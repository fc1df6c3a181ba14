"""The page for people: its files over HTTP, and what it does in a real browser."""

from __future__ import annotations

import itertools
import math
import re
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from browsing import Visitor, needs_browser, open_browser, visiting
from playwright.sync_api import Browser, Route, expect
from toy_service_models import (
    CLASSES,
    ToyTeacher,
    open_gate,
    picture,
    running,
    serving,
    toy_logits,
    toy_served,
    views,
    wait_until,
)

from services import keys
from services.app import create_app
from services.identity import OPEN_PATHS
from services.images import decode
from services.page import PATHS
from services.pixels import PixelBudget
from services.policy import Asked, Policy, Span, require_allowed
from services.settings import Settings
from services.state_folder import StateFolder
from services.teachers import ServedTeacher
from services.wire import pack_images

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "services/page"
FILES = [path for path in FOLDER.iterdir() if path.is_file() and path.suffix != ".py"]
TENSORS = {"Content-Type": "application/safetensors"}
IMAGE, ANOTHER = picture("PNG"), picture("PNG", seed=1)
LOGITS = toy_logits(decode(IMAGE, "image/png", (3, 8, 8), PixelBudget(10_000))[0])[0].double()


def names_by_mass(temperature: float) -> dict[str, float]:
    """The soft target of `IMAGE`, as the teacher has it: value down, then class up."""
    probabilities = torch.softmax(LOGITS / temperature, 0)
    order = probabilities.sort(descending=True, stable=True).indices
    return {f"class {int(index)}": float(probabilities[index]) for index in order}


def entropy_bits(temperature: float) -> float:
    return -sum(one * math.log2(one) for one in names_by_mass(temperature).values())


# ---------------------------------------------------------------- its files


@pytest.fixture(scope="module")
def plain() -> Iterator[httpx.Client]:
    """A service without keys."""
    with serving(toy_served(open_gate(ToyTeacher()))) as client:
        yield client


@pytest.mark.parametrize("path", sorted(PATHS))
def test_a_file_comes_with_the_headers_that_keep_it_harmless(plain: httpx.Client, path: str) -> None:
    answer = plain.get(path)
    assert answer.status_code == 200
    kind = {"css": "text/css", "js": "text/javascript", "/": "text/html"}[path.rpartition(".")[2]]
    assert answer.headers["content-type"] == f"{kind}; charset=utf-8"
    policy = dict(rule.split(" ", 1) for rule in answer.headers["content-security-policy"].split("; "))
    assert policy == {
        "default-src": "'none'",
        "script-src": "'self'",
        "style-src": "'self'",
        "connect-src": "'self'",
        "img-src": "'self' blob: data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert answer.headers["cross-origin-resource-policy"] == "same-origin"
    assert answer.headers["cache-control"] == "no-cache"
    again = plain.get(path, headers={"If-None-Match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert plain.get(path, headers={"If-None-Match": '"older"'}).content == answer.content
    assert plain.post(path).status_code == 405


def test_what_the_page_needs_is_served_and_packaged_and_nothing_else_is() -> None:
    files = {path.name: path.read_text() for path in FILES}
    assert {path.rpartition("/")[2] or "index.html" for path in PATHS} == set(files)
    wanted = set(re.findall(r'(?:href|src)="page/([^"]+)"', files["index.html"]))
    for text in files.values():
        wanted |= set(re.findall(r'from "\./([^"]+)"', text))
    assert wanted | {"index.html"} == set(files)
    packaged = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert {path.name for pattern in packaged["services.page"] for path in FOLDER.glob(pattern)} == set(files)


def test_nothing_is_inline_and_nothing_is_from_elsewhere() -> None:
    text = (FOLDER / "index.html").read_text()
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", text)
    for path in FILES:
        elsewhere = set(re.findall(r"\b(?:https?:)?//[\w.]+\.\w+[^\s\"']*", path.read_text()))
        assert elsewhere <= {"http://www.w3.org/2000/svg"}, f"{path.name}: {elsewhere}"
        stored = re.findall(r"localStorage|sessionStorage|document\.cookie|indexedDB|innerHTML", path.read_text())
        assert stored == [], path.name


def test_it_can_be_turned_off() -> None:
    with serving(toy_served(open_gate(ToyTeacher())), page=False) as client:
        unknown = client.get("/nowhere")
        for path in PATHS:
            answer = client.get(path)
            assert answer.status_code == 404, path
            assert answer.json().keys() == unknown.json().keys()
        assert client.get("/v1/load").status_code == 200


def test_its_files_need_no_key_and_nothing_else_is_open(tmp_path: Path) -> None:
    with serving(toy_served(open_gate(ToyTeacher())), state=tmp_path) as client:
        assert {client.get(path).status_code for path in PATHS} == {200}
        assert StateFolder(tmp_path).audit.read_text() == ""
        for path in ("/page", "/page/", "/page/../v1/usage", "/page/index.html", "/index.html", "/?x/v1"):
            status = client.get(path).status_code
            assert status == (200 if path == "/?x/v1" else 401), path
    with serving(toy_served(open_gate(ToyTeacher())), state=tmp_path, page=False) as client:
        assert {client.get(path).status_code for path in PATHS} == {401}
    assert not OPEN_PATHS & PATHS


# ---------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One for this module."""
    with open_browser() as found:
        yield found


@contextmanager
def open_page(browser: Browser, served: ServedTeacher | None = None, **settings: Any) -> Iterator[Visitor]:
    """A visitor of a server of its own, without keys."""
    refused = settings.pop("refused", ())
    with (
        serving(served or toy_served(open_gate(ToyTeacher())), **settings) as client,
        visiting(browser, str(client.base_url).rstrip("/"), refused=refused) as visitor,
    ):
        expect(visitor.page.locator("#main")).to_be_visible()
        yield visitor


@contextmanager
def open_with_key(browser: Browser, folder: Path, policy: Policy, refused: tuple[int, ...] = ()) -> Iterator[Visitor]:
    """A visitor whose key has this policy, and who has typed it."""
    key = keys.add(StateFolder(folder), "alice", policy)
    with (
        serving(toy_served(open_gate(ToyTeacher())), state=folder) as client,
        visiting(browser, str(client.base_url).rstrip("/"), refused=(401, *refused)) as visitor,
    ):
        expect(visitor.page.get_by_label("Key", exact=True)).to_be_focused()
        visitor.page.keyboard.insert_text(key)
        visitor.press("Enter")
        expect(visitor.page.locator("#main")).to_be_visible()
        yield visitor


def shown_at(visitor: Visitor, temperature: float) -> None:
    """Waits until the page shows the target at this temperature, and compares it with the teacher's."""
    expect(visitor.page.locator("#shown")).to_have_text(f"{temperature:#.3g}")
    expect(visitor.page.locator("#answer")).to_be_visible()
    expected = names_by_mass(temperature)
    found = visitor.target()
    assert list(found) == list(expected)
    assert found == pytest.approx(expected, abs=1e-6)
    assert visitor.entropy() == pytest.approx([entropy_bits(temperature)], abs=1e-5)


@needs_browser
def test_the_card_is_shown(browser: Browser) -> None:
    with open_page(browser, max_images=20) as visitor:
        page = visitor.page
        expect(page.get_by_role("heading", level=1)).to_have_text("toy")
        expect(page).to_have_title("toy – teacher service")
        expect(page.locator("#summary")).to_have_text("7 classes · 8 × 8 pixels, RGB")
        expect(page.locator("#key-facts dt").first).to_have_text("Name")
        facts = visitor.facts("#card-facts")
        assert facts["Digest"] == ToyTeacher.fingerprint
        assert facts["Outputs"] == "logits, logprobs, probs, topk, gather"
        assert facts["Preprocessing"] == "x / 255"
        assert facts["Computed"] == "fp32 on cpu, 1 thread, 8 rows a batch"
        assert "class 0, class 1" in facts["Classes"]
        assert visitor.facts("#key-facts") == {
            "Name": "(no key)",
            "Used": "0 images in 0 requests",
            "Today": "0 images",
            "A request": "20 images, 64 MiB, 33.6 megapixels",
        }
        expect(page.locator("#choice")).to_be_hidden()
        expect(page.locator("#leave")).to_be_hidden()


@needs_browser
def test_an_image_is_tried_with_the_keyboard_alone(browser: Browser) -> None:
    with open_page(browser) as visitor:
        page = visitor.page
        visitor.tab_to("file")
        with page.expect_file_chooser() as chosen:
            visitor.press("Enter")
        chosen.value.set_files({"name": "a <b>cat</b>.png", "mimeType": "image/png", "buffer": IMAGE})
        expect(page.locator("#result")).to_be_visible()
        expect(page.locator("#drop-name")).to_have_text("a <b>cat</b>.png")
        expect(page.locator("#preview")).to_have_attribute("alt", "The image a <b>cat</b>.png")
        expect(page.locator("#drop-note")).to_contain_text("8 × 8 pixels")
        assert "resized" not in page.locator("#drop-note").inner_text()
        asked = httpx.post(
            f"{visitor.base}/v1/teachers/toy/predict",
            params={"output": "topk", "k": CLASSES},
            content=IMAGE,
            headers={"Content-Type": "image/png"},
        ).json()
        found = visitor.target()
        assert list(found) == asked["names"][0]
        assert list(found.values()) == pytest.approx([math.exp(value) for value in asked["values"][0]], abs=1e-6)
        first = page.locator("#classes li").first
        assert first.locator("data").inner_text() == f"{100 * next(iter(found.values())):.2f}\u202f%"
        expect(page.get_by_role("status").and_(page.locator("#said"))).to_contain_text(
            f"Likeliest: {next(iter(found))}"
        )
        expect(page.locator("#key-facts")).to_contain_text(
            "2 images in 2 requests" if False else "1 image in 1 request"
        )

        visitor.tab_to("temperature")
        shown_at(visitor, 1.0)
        visitor.press("ArrowRight", 30)
        shown_at(visitor, 2.0)
        visitor.press("ArrowUp")
        shown_at(visitor, 2.04)
        visitor.press("ArrowLeft", 61)
        shown_at(visitor, 0.5)
        visitor.press("End")
        shown_at(visitor, 20.0)
        visitor.press("Home")
        shown_at(visitor, 0.1)
        assert page.locator("#temperature").get_attribute("aria-valuetext") == "0.100"
        assert len(visitor.asked("/predict")) == 1


@needs_browser
@pytest.mark.parametrize("how", ["drop", "paste"])
def test_an_image_can_be_dropped_or_pasted(browser: Browser, how: str) -> None:
    script = """([how, bytes]) => {
        const files = new DataTransfer();
        for (const name of ["one.png", "two.png"])
            files.items.add(new File([new Uint8Array(bytes)], name, { type: "image/png" }));
        const where = document.getElementById("drop-name");
        const options = { bubbles: true, cancelable: true, dataTransfer: files, clipboardData: files };
        if (how === "paste") return where.dispatchEvent(new ClipboardEvent("paste", options));
        where.dispatchEvent(new DragEvent("dragover", options));
        if (!document.getElementById("drop").classList.contains("over")) throw new Error("not lit");
        if (where.dispatchEvent(new DragEvent("drop", options))) throw new Error("the browser would open the file");
    }"""
    with open_page(browser) as visitor:
        visitor.page.evaluate(script, [how, list(picture("PNG", size=(20, 10)))])
        expect(visitor.page.locator("#result")).to_be_visible()
        expect(visitor.page.locator("#drop-name")).to_have_text("one.png")
        note = visitor.page.locator("#drop-note")
        expect(note).to_contain_text("20 × 10 pixels")
        expect(note).to_contain_text("resized and cropped to 8 × 8 · the first of 2")
        assert "over" not in (visitor.page.locator("#drop").get_attribute("class") or "")


@needs_browser
def test_a_bad_file_shows_what_the_server_says_of_it(browser: Browser) -> None:
    with open_page(browser, refused=(415, 422)) as visitor:
        trouble = visitor.page.locator("#trial-trouble")
        assert trouble.get_attribute("role") == "alert"
        visitor.choose(IMAGE[:60])
        expect(trouble).to_contain_text("422 Unprocessable ")
        expect(trouble.locator("code")).to_have_text("image")
        expect(trouble).to_contain_text("must be a whole PNG file. Found: PNG that does not.")
        expect(trouble).to_contain_text("Check the file.")
        expect(trouble).to_contain_text(re.compile(r"Request [0-9a-f]{32}"))
        expect(visitor.page.locator("#result")).to_be_hidden()
        visitor.choose(b"text", "notes.txt", "text/plain")
        expect(trouble.locator("code")).to_have_text("Content-Type")
        expect(visitor.page.locator("#figure")).to_be_hidden()
        visitor.choose(IMAGE)
        expect(visitor.page.locator("#result")).to_be_visible()
        expect(trouble).to_be_empty()
        shown_at(visitor, 1.0)


@needs_browser
def test_a_teacher_that_was_exchanged_is_not_taken_for_the_one_on_the_card(browser: Browser) -> None:
    teacher = open_gate(ToyTeacher())
    with open_page(browser, toy_served(teacher), refused=(412,)) as visitor:
        teacher.fingerprint = "f" * 32
        visitor.choose(IMAGE)
        expect(visitor.page.locator("#trial-trouble")).to_contain_text("412 Precondition Failed")


@needs_browser
def test_a_teacher_that_fails_is_told_and_can_be_asked_again(browser: Browser) -> None:
    teacher = open_gate(ToyTeacher())
    with open_page(browser, toy_served(teacher), refused=(500,)) as visitor:
        visitor.choose(IMAGE)
        shown_at(visitor, 1.0)
        teacher.broken = True
        visitor.choose(ANOTHER)
        expect(visitor.page.locator("#trial-trouble")).to_contain_text("500 Internal Server Error")
        expect(visitor.page.locator("#trial-trouble")).to_contain_text("teacher must answer")
        expect(visitor.page.locator("#result")).to_be_hidden()
        teacher.broken = False
        visitor.choose(IMAGE)
        shown_at(visitor, 1.0)
        expect(visitor.page.locator("#trial-trouble")).to_be_empty()


@needs_browser
def test_an_answer_says_how_the_cache_keeps_it(browser: Browser) -> None:
    script = """async () => {
        const { drawTarget } = await import("/page/bars.js");
        const target = { rows: [{ index: 2, probability: 1 }], rest: { classes: 0, probability: 0 }, nats: [0, 0] };
        drawTarget({ class_names: null }, target, { encodings: { logits: "dense_u8" } });
    }"""
    with open_page(browser) as visitor:
        visitor.choose(IMAGE)
        shown_at(visitor, 1.0)
        expect(visitor.page.locator("#remark")).to_be_empty()
        visitor.page.evaluate(script)
        expect(visitor.page.locator("#remark")).to_have_text("Read from the cache, where logits are kept as dense_u8.")
        assert visitor.target() == {"class 2": 1.0}


@needs_browser
def test_names_are_text(browser: Browser) -> None:
    hostile = tuple(f"<img src=x onerror=alert({number})>" for number in range(CLASSES))
    served = toy_served(open_gate(ToyTeacher()))
    object.__setattr__(served, "class_names", hostile)
    with open_page(browser, served) as visitor:
        visitor.choose(IMAGE)
        expect(visitor.page.locator("#classes li").first).to_contain_text("<img src=x")
        assert set(visitor.target()) == set(hostile)
        assert visitor.asked("/x") == []


@needs_browser
def test_load_is_live_and_rests_while_nobody_looks(browser: Browser) -> None:
    with open_page(browser) as visitor:
        expect(visitor.page.locator("#load-figures")).to_contain_text("0 of 4,096")
        assert visitor.facts("#load-figures") == {"Images a second": "0", "Waiting": "0 of 4,096", "Batch fill": "–"}
        body = pack_images(views(20))
        httpx.post(f"{visitor.base}/v1/teachers/toy/predict", content=body, headers=TENSORS).raise_for_status()
        expect(visitor.page.locator("#load-figures")).to_contain_text("83%")
        assert visitor.facts("#load-figures")["Images a second"] == "2"
        picture_ = visitor.page.get_by_role("img", name="Images a second in the last minute: now 2, at most 2")
        expect(picture_).to_be_visible()
        hide = "hidden => {Object.defineProperty(document, 'hidden', {value: hidden, configurable: true}); "
        hide += "document.dispatchEvent(new Event('visibilitychange'))}"
        visitor.page.evaluate(hide, True)
        visitor.page.wait_for_timeout(100)
        before = len(visitor.asked("/v1/load"))
        visitor.page.wait_for_timeout(1300)
        assert len(visitor.asked("/v1/load")) == before
        with visitor.page.expect_request("**/v1/load"):
            visitor.page.evaluate(hide, False)


@needs_browser
def test_one_of_several_teachers_is_chosen(browser: Browser) -> None:
    served = {name: toy_served(open_gate(ToyTeacher()), name=name) for name in ("first", "second")}
    app = create_app(served, Settings())
    app.state.service.draining = True
    with running(app) as base, visiting(browser, base) as visitor:
        expect(visitor.page.get_by_role("heading", level=1)).to_have_text("first")
        expect(visitor.page.locator("#draining")).to_be_visible()
        visitor.choose(IMAGE)
        shown_at(visitor, 1.0)
        visitor.page.get_by_label("Teacher", exact=True).select_option("second")
        expect(visitor.page.get_by_role("heading", level=1)).to_have_text("second")
        shown_at(visitor, 1.0)
        expect(visitor.page.locator("#key-facts")).to_contain_text("2 images in 2 requests")
        assert [request.url.split("/")[5] for request in visitor.asked("/predict")] == ["first", "second"]


@needs_browser
def test_a_server_that_is_gone_is_told_apart(browser: Browser) -> None:
    with open_page(browser) as visitor:
        visitor.page.context.set_offline(True)
        visitor.choose(IMAGE)
        expect(visitor.page.locator("#trial-trouble")).to_contain_text("No answer")
        expect(visitor.page.locator("#trial-trouble")).to_contain_text("server must be reachable")
        expect(visitor.page.locator("#load-trouble")).to_contain_text("Not known at the moment")
        visitor.page.context.set_offline(False)
        visitor.choose(IMAGE)
        shown_at(visitor, 1.0)
        expect(visitor.page.locator("#load-trouble")).to_be_empty()
        offline = [text for text in visitor.complaints if "ERR_INTERNET_DISCONNECTED" in text]
        assert offline
        visitor.complaints[:] = [text for text in visitor.complaints if text not in offline]


# ---------------------------------------------------------------- keys


@needs_browser
def test_the_key_is_asked_for_and_kept_in_memory_only(browser: Browser, tmp_path: Path) -> None:
    with open_with_key(browser, tmp_path, Policy(images_per_day=1), refused=(429,)) as visitor:
        page = visitor.page
        expect(page.get_by_role("heading", level=1)).to_be_focused()
        expect(page.locator("#key-facts")).to_contain_text("0 images, 1 left")
        assert page.locator("#key").input_value() == ""
        visitor.choose(IMAGE)
        shown_at(visitor, 1.0)
        expect(page.locator("#key-facts")).to_contain_text("1 image, 0 left")
        visitor.choose(IMAGE)
        trouble = page.locator("#trial-trouble")
        expect(trouble).to_contain_text("429 Too Many Requests")
        expect(trouble).to_contain_text(re.compile(r"images_per_day.*is 1 for this key.*It may help to wait \d+ s"))
        assert page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]") == [0, 0, ""]
        assert page.context.cookies() == []
        keys.revoke(StateFolder(tmp_path), "alice")
        expect(page.locator("#door-trouble")).to_contain_text("401 Unauthorized")
        expect(page.locator("#main")).to_be_hidden()
        page.reload()
        expect(page.get_by_label("Key", exact=True)).to_be_focused()
        expect(page.locator("#door-trouble")).to_be_empty()


@needs_browser
def test_a_key_that_ends_is_told_once_by_several_questions(browser: Browser, tmp_path: Path) -> None:
    key = keys.add(StateFolder(tmp_path), "alice", Policy())
    served = {name: toy_served(open_gate(ToyTeacher()), name=name) for name in ("first", "second")}
    app = create_app(served, Settings(state=tmp_path))
    with running(app) as base, visiting(browser, base, refused=(401,)) as visitor:
        page = visitor.page
        page.get_by_label("Key", exact=True).fill(key)
        visitor.press("Enter")
        expect(page.locator("#main")).to_be_visible()
        visitor.choose(IMAGE)
        expect(page.locator("#result")).to_be_visible()
        refused: list[str] = []
        page.on("response", lambda answer: refused.append(answer.url) if answer.status == 401 else None)
        # The load is asked for each second, and would tell before the choice is made: it is held until then.
        polls: list[Route] = []
        with page.expect_request("**/v1/load"):
            page.route("**/v1/load", lambda route: polls.append(route))
        keys.revoke(StateFolder(tmp_path), "alice")
        page.get_by_label("Teacher", exact=True).select_option("second")
        for poll in polls:
            poll.continue_()
        expect(page.locator("#door-trouble")).to_contain_text("401 Unauthorized")
        page.wait_for_timeout(300)
        assert len(refused) > 1
        expect(page.locator("#door-trouble")).to_contain_text("401 Unauthorized")
        expect(page.locator("#trouble")).to_be_empty()


@needs_browser
def test_one_answer_on_its_way_is_not_asked_for_again(browser: Browser) -> None:
    teacher = ToyTeacher()
    with open_page(browser, toy_served(teacher)) as visitor:
        open_gate(teacher)
        visitor.choose(IMAGE)
        shown_at(visitor, 1.0)
        teacher.gate.clear()
        visitor.choose(IMAGE)
        visitor.page.locator("#temperature").focus()
        visitor.press("ArrowRight", 30)
        visitor.page.wait_for_timeout(400)
        expect(visitor.page.locator("#answer")).to_be_hidden()
        teacher.gate.set()
        shown_at(visitor, 2.0)
        assert len(visitor.asked("/predict")) == 2


@needs_browser
def test_a_wrong_key_is_refused_and_another_can_be_used(browser: Browser, tmp_path: Path) -> None:
    with open_with_key(browser, tmp_path, Policy()) as visitor:
        page = visitor.page
        page.get_by_role("button", name="Use another key").press("Enter")
        expect(page.get_by_label("Key", exact=True)).to_be_focused()
        expect(page.locator("#main")).to_be_hidden()
        expect(page.locator("#door-trouble")).to_be_empty()
        page.keyboard.insert_text("ts_wrong")
        visitor.press("Enter")
        expect(page.locator("#door-trouble")).to_contain_text("must carry this server's key")
        before = len(visitor.requests)
        page.get_by_label("Key", exact=True).fill("clé")
        visitor.press("Enter")
        expect(page.locator("#door-trouble")).to_contain_text("key must be visible ASCII characters")
        assert len(visitor.requests) == before
        page.get_by_label("Key", exact=True).fill(keys.add(StateFolder(tmp_path), "bob", Policy()))
        page.get_by_role("button", name="Enter").click()
        expect(page.locator("#key-facts")).to_contain_text("bob")


@needs_browser
def test_a_key_with_a_few_classes_and_temperatures_asks_for_each(browser: Browser, tmp_path: Path) -> None:
    policy = Policy(outputs=("topk",), largest_k=3, temperatures=(4.0, 1.0, 2.0))
    with open_with_key(browser, tmp_path, policy) as visitor:
        visitor.choose(IMAGE)
        for presses, temperature in ((0, 1.0), (1, 2.0), (1, 4.0)):
            visitor.page.locator("#temperature").focus()
            visitor.press("ArrowRight", presses)
            expect(visitor.page.locator("#shown")).to_have_text(f"{temperature:#.3g}")
            expect(visitor.page.locator("#answer")).to_be_visible()
            everything = names_by_mass(temperature)
            expected = dict(itertools.islice(everything.items(), 3))
            expected["4 other classes"] = 1 - sum(expected.values())
            found = visitor.target()
            assert list(found) == list(expected)
            assert found == pytest.approx(expected, abs=1e-6)
            low, high = visitor.entropy()
            assert low - 1e-6 <= entropy_bits(temperature) <= high + 1e-6
        asked = [request.url.partition("?")[2] for request in visitor.asked("/predict")]
        assert asked == [f"output=topk&k=3&temperature={temperature}" for temperature in (1, 2, 4)]
        visitor.press("ArrowLeft", 2)
        expect(visitor.page.locator("#shown")).to_have_text("1.00")
        assert next(iter(visitor.target().values())) == pytest.approx(next(iter(names_by_mass(1).values())), abs=1e-6)
        visitor.page.wait_for_timeout(400)
        assert len(visitor.asked("/predict")) == 3, "what is known is not paid again"
        assert visitor.facts("#key-facts")["Temperatures"] == "4, 1, 2"
        another = toy_logits(decode(ANOTHER, "image/png", (3, 8, 8), PixelBudget(10_000))[0])[0].double()
        other = [float(torch.softmax(another / temperature, 0).max()) for temperature in (1, 2)]
        visitor.choose(ANOTHER)
        for presses, count in ((0, 4), (1, 5)):
            visitor.press("ArrowRight", presses)
            temperature = (1.0, 2.0)[presses]
            expect(visitor.page.locator("#shown")).to_have_text(f"{temperature:#.3g}")
            expect(visitor.page.locator("#classes li").first).to_contain_text(f"{100 * other[presses]:.2f}")
            assert len(visitor.asked("/predict")) == count


@needs_browser
def test_a_key_that_rounds_is_told_so(browser: Browser, tmp_path: Path) -> None:
    with open_with_key(browser, tmp_path, Policy(outputs=("probs",), temperatures=(2.0,), rounding=0.05)) as visitor:
        visitor.choose(IMAGE)
        expect(visitor.page.locator("#remark")).to_have_text("This key's answers are rounded to multiples of 0.05.")
        expect(visitor.page.locator("#temperature")).to_be_disabled()
        expect(visitor.page.locator("#shown")).to_have_text("2.00")
        assert all(value == pytest.approx(round(value / 0.05) * 0.05) for value in visitor.target().values())


POLICIES = {
    "all": (Policy(), True, "logits"),
    "logits, few temperatures": (Policy(temperatures=(3.0,)), True, "logits"),
    "logprobs": (Policy(outputs=("probs", "logprobs")), True, "logprobs"),
    "logprobs, 1 among them": (Policy(outputs=("logprobs",), temperatures=(1.0, 3.0)), True, "logprobs"),
    "logprobs, not at 1": (Policy(outputs=("logprobs",), temperatures=(3.0, 2.0)), False, "logprobs"),
    "logprobs, softer": (Policy(outputs=("logprobs",), temperatures=Span(low=1.97, high=8)), False, "logprobs"),
    "beyond the slider": (Policy(outputs=("probs",), temperatures=Span(low=50, high=80)), False, "probs"),
    "probs": (Policy(outputs=("probs",)), False, "probs"),
    "topk": (Policy(outputs=("topk",)), False, "topk"),
    "top 2": (Policy(outputs=("topk",), largest_k=2, temperatures=(1.0,)), False, "topk"),
    "top 2000": (Policy(outputs=("topk",), largest_k=2000), False, "topk"),
    "features only": (Policy(outputs=("features",)), None, "nothing that is made of logits"),
    "no temperature": (Policy(outputs=("probs",), temperatures=()), None, "no temperature"),
    "by id": (Policy(by_id_only=True), None, "images are not taken"),
}


@needs_browser
def test_only_what_a_key_may_ask_is_asked(browser: Browser) -> None:
    """Every question that the slider can lead to is one that the policy lets through."""
    served = toy_served(open_gate(ToyTeacher()))
    script = """async card => {
        const { planOf, queryOf } = await import("/page/target.js");
        const plan = planOf(card);
        return { ...plan, queries: (plan.temperatures ?? []).map((one) => queryOf(plan, one)) };
    }"""
    with open_page(browser) as visitor:
        for label, (policy, once, output) in POLICIES.items():
            plan = visitor.page.evaluate(script, served.card(Settings(), policy).model_dump(mode="json"))
            if once is None:
                assert output in plan["reason"], label
                continue
            assert (plan["once"], plan["output"]) == (once, output), label
            temperatures = plan["temperatures"]
            assert temperatures == sorted(set(temperatures)), label
            if isinstance(policy.temperatures, Span):
                assert (temperatures[0], temperatures[-1]) == (policy.temperatures.low, policy.temperatures.high), label
            assert len({str(query) for query in plan["queries"]}) == (1 if once else len(temperatures)), label
            for query in plan["queries"]:
                soft = query["output"] != "logits"
                assert ("temperature" in query) == soft, label
                assert ("k" in query) == (query["output"] == "topk"), label
                assert query.get("k", 1) <= CLASSES, label
                asked = Asked("toy", (query["output"],), query.get("k"), query.get("temperature"), uploaded=True)
                require_allowed(policy, asked, now=None)  # type: ignore[arg-type]


@needs_browser
def test_a_key_that_takes_no_images_finds_the_field_closed(browser: Browser, tmp_path: Path) -> None:
    with open_with_key(browser, tmp_path, Policy(by_id_only=True)) as visitor:
        expect(visitor.page.locator("#drop-name")).to_have_text("No image can be tried.")
        expect(visitor.page.locator("#drop-note")).to_contain_text("asks by sample key only")
        expect(visitor.page.locator("#file")).to_be_disabled()
        wait_until(lambda: visitor.facts("#key-facts").get("Images") == "none: sample keys only")
