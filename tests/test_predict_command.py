"""`teacher-serve predict`: what a person sees, what a script reads, and one line for what goes wrong."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from toy_service_models import ToyTeacher, open_gate, picture, running, toy_logits, toy_served, wait_until

from services.__main__ import main
from services.app import create_app
from services.settings import Settings

KEY = "a-key-for-tests"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A service of the toy teacher, with a key."""
    app = create_app({"toy": toy_served(open_gate(ToyTeacher()))}, Settings(api_key=KEY))  # type: ignore[arg-type]
    with running(app) as base:
        wait_until(lambda: app.state.service.not_ready() == [])
        yield f"{base}/toy"


@pytest.fixture
def images(tmp_path: Path) -> list[str]:
    """A picture of the teacher's size, and one that is larger."""
    (tmp_path / "small.png").write_bytes(picture("PNG"))
    (tmp_path / "large.jpg").write_bytes(picture("JPEG", (20, 10)))
    return [str(tmp_path / name) for name in ("small.png", "large.jpg")]


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is in the environment, as it should be."""
    monkeypatch.setenv("TEACHER_API_KEY", KEY)


def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0
) -> tuple[str, str]:
    """What the command prints, on both channels."""
    monkeypatch.setattr("sys.argv", ["teacher-serve", "predict", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    shown = capsys.readouterr()
    assert ended.value.code == code, shown.err
    return shown.out, shown.err


def pixels(path: str) -> torch.Tensor:
    """A picture as the service sees it."""
    from services.images import decode
    from services.pixels import PixelBudget

    views, _ = decode(Path(path).read_bytes(), "image/png", (3, 8, 8), PixelBudget(10**6))
    return views


def test_a_person_sees_the_best_classes_by_name(
    url: str, images: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, err = run(monkeypatch, capsys, *images, "--url", url, "--k", "2", "--temperature", "4")
    expected = torch.log_softmax(toy_logits(pixels(images[0])) / 4, 1)[0].sort(descending=True, stable=True)
    lines = [line for line in out.splitlines() if line.startswith("│") and "class " in line]
    assert len(lines) == 4
    for line, value, index in zip(lines[:2], expected.values, expected.indices, strict=False):
        assert f"class {index}" in line
        assert f"{value:.4f}" in line
    assert (
        "large.jpg" in json.loads(run(monkeypatch, capsys, *images, "--url", url, "--json")[0])["answers"][1]["image"]
    )
    assert "resized and cropped to 8×8" in out
    assert err == ""


@pytest.mark.parametrize("output", ["logits", "probs", "logprobs"])
def test_other_outputs_are_ranked_too(
    url: str, images: list[str], output: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = run(monkeypatch, capsys, images[0], "--url", url, "--output", output)
    values = [float(line.split("│")[3]) for line in out.splitlines() if line.startswith("│") and "class " in line]
    assert len(values) == 5
    assert values == sorted(values, reverse=True)
    assert "resized" not in out


def test_a_script_reads_everything(
    url: str, images: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = json.loads(run(monkeypatch, capsys, *images, "--url", url, "--json", "--k", "3")[0])
    assert found["teacher"] == "toy"
    assert len(found["digest"]) == 32
    first, second = found["answers"]
    assert [first["resized"], second["resized"]] == [False, True]
    assert first["names"] == [f"class {index}" for index in first["indices"]]
    mass = sum(map(math.exp, first["values"])) + math.exp(first["tail_logmass"])
    assert mass == pytest.approx(1)
    logits = json.loads(run(monkeypatch, capsys, images[0], "--url", url, "--json", "--output", "logits")[0])
    assert torch.equal(torch.tensor([logits["answers"][0]["values"]]), toy_logits(pixels(images[0])))


def test_what_goes_wrong_is_one_line(
    url: str, images: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, err = run(monkeypatch, capsys, images[0], "--url", url, "--k", "99", code=1)
    assert err.startswith("error: k (HTTP 400")
    _, err = run(monkeypatch, capsys, images[0], "--url", "here", code=2)
    assert "host:port" in err
    _, err = run(monkeypatch, capsys, images[0], "none.png", "--url", "http://127.0.0.1:1/toy", code=2)
    assert "must be a readable file" in err, "before anybody is asked"
    monkeypatch.setenv("TEACHER_API_KEY", "wrong")
    _, err = run(monkeypatch, capsys, images[0], "--url", url, code=1)
    assert "HTTP 401" in err
