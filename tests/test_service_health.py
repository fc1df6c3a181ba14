"""Health and readiness tell the truth: dead threads, full disks, and what comes back by itself."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import httpx
import pytest
from torch import Tensor
from toy_service_models import POISON, ToyTeacher, open_gate, running, toy_served, views, wait_until

from services import keys, scribe
from services.app import create_app
from services.audit import Audit
from services.backlog import Backlog
from services.batching import Batcher
from services.policy import Policy
from services.settings import Settings
from services.state import make_service
from services.state_folder import StateFolder
from services.wire import pack_images

PREDICT = "/v1/teachers/toy/predict"
TENSORS = {"Content-Type": "application/safetensors"}


class Deadly(ToyTeacher):
    """A poison ends its thread, as a model that calls sys.exit() would."""

    dying: threading.Event | None = None
    """What it waits for before it ends."""

    def __call__(self, views_BCHW: Tensor) -> dict[str, Tensor]:
        try:
            return super().__call__(views_BCHW)
        except ArithmeticError:
            if self.dying is not None:
                assert self.dying.wait(20)
            raise SystemExit(3) from None


def poisonous() -> Tensor:
    """A batch that `Deadly` does not survive."""
    images = views(2)
    images[1, 0, 0, 0] = POISON
    return images


def test_a_dead_thread_leaves_nobody_waiting() -> None:
    teacher = Deadly()
    batcher = Batcher(toy_served(teacher), 100, 60.0)
    batcher.start()
    inside = batcher.submit(poisonous(), ("logits",), "someone")
    assert teacher.entered.acquire(timeout=20)
    waiting, joined = (batcher.submit(views(3), ("logits",), "someone", identity=b"same") for _ in range(2))
    assert not batcher.dead
    teacher.gate.set()
    for answer in (inside, waiting, joined, batcher.submit(views(1), ("logits",), "someone")):
        with pytest.raises(CancelledError):
            answer.result(20)
    wait_until(lambda: batcher.dead)
    with pytest.raises(CancelledError):
        batcher.submit(views(1), ("logits",), "someone").result(20)
    batcher.stop()


def test_nobody_is_forgotten_who_asks_while_the_thread_dies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever is on the way from a line to the open batch at that moment is told, too."""
    moving, found = threading.Event(), Backlog.take

    def slow(backlog: Backlog, room: int) -> Any:
        piece = found(backlog, room)
        if piece is not None and teacher.gate.is_set():
            # The lock is held: whoever wants it now waits until this piece has its place.
            moving.set()
            time.sleep(0.2)
        return piece

    teacher = Deadly()
    batcher = Batcher(toy_served(teacher), 100, 60.0)
    batcher.start()
    inside = batcher.submit(poisonous(), ("logits",), "someone")
    assert teacher.entered.acquire(timeout=20)
    monkeypatch.setattr(Backlog, "take", slow)
    monkeypatch.setattr(teacher, "dying", moving)
    teacher.gate.set()
    late = batcher.submit(views(3), ("logits",), "someone")
    for answer in (inside, late):
        with pytest.raises(CancelledError):
            answer.result(20)
    batcher.stop()


def test_a_process_whose_model_has_died_is_not_alive() -> None:
    app = create_app({"toy": toy_served(open_gate(Deadly()))}, Settings())
    with running(app) as url, httpx.Client(base_url=url, timeout=20) as client:
        wait_until(lambda: client.get("/readyz").status_code == 200)
        assert client.get("/livez").status_code == 200
        answer = client.post(PREDICT, content=pack_images(poisonous()), headers=TENSORS)
        assert answer.status_code == 503
        wait_until(lambda: client.get("/livez").status_code == 503)
        for place in ("/livez", "/readyz"):
            answer = client.get(place)
            assert answer.status_code == 503
            assert "thread of toy has died" in answer.json()["value"]


def test_one_that_cannot_warm_up_is_alive_and_never_ready() -> None:
    app = create_app({"toy": toy_served(ToyTeacher(broken=True))}, Settings())
    with running(app) as url:
        time.sleep(0.1)
        assert httpx.get(f"{url}/livez").status_code == 200
        assert "not warm" in httpx.get(f"{url}/readyz").json()["value"]


def full(*_arguments: Any) -> int:
    """A disk that takes nothing."""
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("book", "break_"),
    [
        ("audit", lambda patch: patch.setattr(Audit, "commit", full)),
        ("usage", lambda patch: patch.setattr("services.usage_file.UsageFile.commit", full)),
    ],
)
def test_books_that_cannot_be_written_show_and_are_tried_again_later(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    book: str,
    break_: Callable[[pytest.MonkeyPatch], None],
) -> None:
    folder = StateFolder(tmp_path / "state")
    key = keys.add(folder, "alice", Policy())
    app = create_app({"toy": toy_served(open_gate(ToyTeacher()))}, Settings(state=folder.path))
    with running(app) as url, httpx.Client(base_url=url, timeout=20) as client:
        wait_until(lambda: client.get("/readyz").status_code == 200)

        def status() -> int:
            headers = {**TENSORS, "Authorization": f"Bearer {key}"}
            return client.post(PREDICT, content=pack_images(views(1)), headers=headers).status_code

        assert status() == 200
        with monkeypatch.context() as patch:
            break_(patch)
            assert status() == 503
            assert f"the {book} cannot be written" in client.get("/readyz").json()["value"]
            assert client.get("/livez").status_code == 200
        assert client.get("/readyz").status_code == 503
        # One that stays away for as long as it is told finds it ready, and then it is seen whether that is true.
        monkeypatch.setattr(scribe, "RETRY_SECONDS", 0)
        assert client.get("/readyz").status_code == 200
        monkeypatch.setattr(scribe, "RETRY_SECONDS", 1000)
        assert client.get("/readyz").status_code == 503
        assert status() == 200
        assert client.get("/readyz").status_code == 200


def test_a_dead_scribe_is_no_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(state=tmp_path / "state", api_key="some-key", journal=tmp_path / "journal")  # type: ignore[arg-type]
    service = make_service({"toy": toy_served(open_gate(ToyTeacher()))}, settings)
    assert service.dead() == []
    service.start()
    assert service.dead() == []
    for number, name in enumerate(("usage", "audit", "journal")):
        service.scribes[number].stop()
        assert service.dead()[number:] == [f"the thread of the {name}"]
        assert f"the thread of the {name} has died" in service.not_ready()
    service.stop()
