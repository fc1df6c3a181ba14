"""A build whose teacher is paid by the image: it pays once, in time, and within its budget, whatever goes wrong."""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from toy_builds import addition_of
from toy_faults import FATES, Fate, Faulty, seeded
from toy_service_models import ToyTeacher, colour_spec, open_gate, running, toy_logits, toy_served, views, wait_until

import teacher_cache as tc
from services.account import Account
from services.app import create_app
from services.http_teacher import HttpTeacher
from services.journal import Journal
from services.journal_file import NAME
from services.policy import Policy
from services.same_teacher import key_of
from services.settings import Settings
from services.teachers import ServedTeacher, open_served
from teacher_cache import cli
from teacher_cache.cost import estimate
from teacher_cache.errors import BudgetError, BuildError, ServiceError, SpecError, TeacherError
from teacher_cache.paid import with_journal
from teacher_cache.spec import BuildSpec, TeacherSpec

QUESTIONS = 10
"""Of the toy build: two views of 21 rows in shards of 10, in micro-batches of 8."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the data set, and the cache `local` that the local teacher built."""
    folder = tmp_path_factory.mktemp("paid")
    tc.build(colour_spec(folder, "local"), executor="serial")
    return folder


@pytest.fixture(scope="module")
def served(folder: Path) -> ServedTeacher:
    """The teacher of the local cache."""
    # Without its data set: every question is sent, with its fillings.
    return replace(open_served(colour_spec(folder, "unused")), library=None)


@pytest.fixture
def serve(served: ServedTeacher) -> Iterator[Callable[..., tuple[str, Faulty]]]:
    """Starts services of that teacher, each with faults of its own."""
    with ExitStack() as stack:

        def start(fate: Callable[[int], Fate] = lambda _: "answer", **more: Any) -> tuple[str, Faulty]:
            app = create_app({"colour": more.pop("served", served)}, Settings())
            faulty = Faulty(app, fate, **more)
            base = stack.enter_context(running(faulty))
            wait_until(lambda: app.state.service.not_ready() == [])
            return f"{base}/colour", faulty

        yield start


@pytest.fixture
def short_rests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replicas are tried again soon."""
    monkeypatch.setattr("services.replicas._FIRST_REST", 0.01)


def spec_of(folder: Path, cache: Path, url: str, **teacher: Any) -> BuildSpec:
    """The build of the local cache, elsewhere, through HTTP."""
    spec = colour_spec(folder, "unused", model=url, **teacher)
    return spec.model_copy(update={"cache": str(cache)})


def data_of(cache: Path) -> dict[str, bytes]:
    """Every file but the manifest."""
    files = [path for path in cache.rglob("*") if path.is_file() and path.name != "manifest.json"]
    return {path.relative_to(cache).as_posix(): path.read_bytes() for path in files}


class Renamed:
    """The same answers under another digest."""

    fingerprint = "f" * 32

    def __init__(self, teacher: Any) -> None:
        self._teacher = teacher

    def __getattr__(self, name: str) -> Any:
        return getattr(self._teacher, name)

    def __call__(self, views_BCHW: torch.Tensor) -> Any:
        return self._teacher(views_BCHW)


def accounts(journal: Path) -> Account:
    """What a journal's only teacher was asked for."""
    db = sqlite3.connect(journal / NAME)
    try:
        (row,) = db.execute("SELECT requests, images, lost_requests, lost_images, damaged FROM accounts").fetchall()
    finally:
        db.close()
    return Account(*row)


def kept_answers(journal: Path) -> int:
    """How many a journal holds."""
    db = sqlite3.connect(journal / NAME)
    try:
        (count,) = db.execute("SELECT count(*) FROM answers").fetchone()
    finally:
        db.close()
    return int(count)


Serve = Callable[..., tuple[str, Faulty]]

# ---------------------------------------------------------------- the journal


def test_each_image_is_paid_once_and_the_bits_are_the_local_ones(folder: Path, tmp_path: Path, serve: Serve) -> None:
    url, faulty = serve(delay=0.02)
    report = tc.build(spec_of(folder, tmp_path / "cache", url, concurrency=3), executor="serial")
    assert data_of(tmp_path / "cache") == data_of(folder / "local")
    assert sorted(faulty.computed.values()) == [1] * QUESTIONS
    assert faulty.most_at_once == 2, "a shard has two micro-batches, and one shard is made at a time"
    assert report.warnings == tc.build(colour_spec(folder, "local"), executor="serial").warnings
    journal = tmp_path / "cache.journal"
    assert accounts(journal) == Account(QUESTIONS, 8 * QUESTIONS)
    assert report.paid == {"requests": QUESTIONS, "images": 8 * QUESTIONS}
    assert kept_answers(journal) == 0, "they are in the cache now"
    priced = spec_of(folder, tmp_path / "cache", url, budget={"price_per_image": "0.05"})
    report = tc.build(priced, executor="serial")
    assert sum(faulty.computed.values()) == QUESTIONS, "a look at a sealed cache costs nothing"
    assert report.paid == {"requests": QUESTIONS, "images": 8 * QUESTIONS, "spent": f"{0.4 * QUESTIONS:.2f}"}


@pytest.mark.parametrize("concurrency", [1, 2, 8])
def test_questions_of_several_views_are_under_way_together(
    folder: Path, tmp_path: Path, serve: Serve, concurrency: int
) -> None:
    url, faulty = serve(delay=0.05)
    # What is measured of an encoding that rounds depends on the order of the sums.
    fields = {"logits": {"encoding": "dense_u8"}, "feature:relu": {"pool": "mean", "encoding": "dense_bf16"}}
    spec = spec_of(folder, tmp_path / "cache", url, concurrency=concurrency, fields=fields)
    spec = spec.model_copy(update={"compute": spec.compute.model_copy(update={"workers": 1, "views_per_decode": 2})})
    # One worker makes both views of a shard's rows: four questions.
    local = spec.model_copy(
        update={"cache": str(tmp_path / "local"), "teacher": colour_spec(folder, "x", fields=fields).teacher}
    )
    tc.build(local, executor="serial")
    tc.build(spec, executor="serial")
    assert faulty.most_at_once <= concurrency
    assert faulty.most_at_once >= min(2, concurrency)
    assert data_of(tmp_path / "cache") == data_of(tmp_path / "local")
    assert addition_of(tmp_path / "cache").totals == addition_of(tmp_path / "local").totals


def test_a_journal_that_is_named_is_kept_and_good_for_another_cache(folder: Path, tmp_path: Path, serve: Serve) -> None:
    url, faulty = serve()
    named = {"journal": str(tmp_path / "answers")}
    for name in ("one", "two"):
        tc.build(spec_of(folder, tmp_path / name, url, **named), executor="serial")
        assert data_of(tmp_path / name) == data_of(folder / "local")
    assert sum(faulty.computed.values()) == QUESTIONS
    assert not (tmp_path / "one.journal").exists()


def test_a_build_that_ends_in_the_middle_keeps_what_was_answered(folder: Path, tmp_path: Path, serve: Serve) -> None:
    """The third question fails for good, while others are under way."""
    url, faulty = serve(lambda number: "500" if number == 2 else "answer", delay=0.05)
    spec = spec_of(folder, tmp_path / "cache", url)
    with pytest.raises(ServiceError, match="HTTP 500"):
        tc.build(spec, executor="serial")
    assert sum(faulty.computed.values()) == 3, "the fourth was under way, and is awaited"
    report = tc.build(spec, executor="serial")
    assert sorted(faulty.computed.values()) == [1] * QUESTIONS
    assert data_of(tmp_path / "cache") == data_of(folder / "local")
    # Nobody knows whether an answer of 500 is on the bill.
    assert accounts(tmp_path / "cache.journal") == Account(QUESTIONS + 1, 8 * QUESTIONS + 8, 1, 8)
    assert "1 requests of 8 images may have been answered and paid for in vain" in report.warnings[-1]


def test_a_worker_ends_when_its_answers_are_home(
    folder: Path, tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Ray an error is the end of the worker that raised it: nobody closes its teacher."""
    monkeypatch.setattr(HttpTeacher, "close", lambda _self: None)
    fates: dict[int, Fate] = {2: "500", 3: "late"}
    url, faulty = serve(lambda number: fates.get(number, "answer"), late=0.5)
    with pytest.raises(ServiceError, match="HTTP 500"):
        tc.build(spec_of(folder, tmp_path / "cache", url), executor="serial")
    assert faulty.delivered.total() == 3


def test_damage_is_asked_for_again_and_told(folder: Path, tmp_path: Path, serve: Serve) -> None:
    url, faulty = serve()
    named = {"journal": str(tmp_path / "answers")}
    tc.build(spec_of(folder, tmp_path / "one", url, **named), executor="serial")
    db = sqlite3.connect(tmp_path / "answers" / NAME, isolation_level=None)
    db.execute("UPDATE answers SET checksum = checksum + 1 WHERE rowid IN (3, 4, 9)")
    db.close()
    report = tc.build(spec_of(folder, tmp_path / "two", url, **named), executor="serial")
    assert data_of(tmp_path / "two") == data_of(folder / "local")
    assert "3 answers in the journal were damaged, and were asked for again." in report.warnings
    # Rows 3 and 4 are the two fields of one question.
    assert sum(faulty.computed.values()) == QUESTIONS + 2


def test_only_missing_fields_are_asked_for(tmp_path: Path) -> None:
    toy = open_gate(ToyTeacher())
    with running(create_app({"toy": toy_served(toy)}, Settings())) as base:
        described = {"model": f"{base}/toy", "micro_batch": 8, "journal": str(tmp_path)}
        one = HttpTeacher(TeacherSpec.model_validate(described))
        one(views(8))
        both = HttpTeacher(TeacherSpec.model_validate({**described, "fields": ["logits", "feature:pixels"]}))
        found = both(views(8))
        assert torch.equal(found["logits"], toy_logits(views(8)))
        assert torch.equal(found["feature:pixels"], views(8).float())
        assert len(toy.batches) == 2
        both(views(8))
        one(views(8))
        assert len(toy.batches) == 2
        one.close()
        both.close()


def test_two_that_ask_the_same_pay_once(tmp_path: Path) -> None:
    toy = ToyTeacher()
    with running(create_app({"toy": toy_served(toy)}, Settings())) as base:
        described = {"model": f"{base}/toy", "micro_batch": 8, "journal": str(tmp_path)}
        teachers = [HttpTeacher(TeacherSpec.model_validate(described)) for _ in range(2)]
        futures = [teacher.submit(views(8)) for teacher in teachers for _ in range(2)]
        assert toy.entered.acquire(timeout=20)
        assert not toy.entered.acquire(timeout=0.3)
        toy.gate.set()
        answers = [future.result(20)["logits"] for future in futures]
        assert all(torch.equal(answer, toy_logits(views(8))) for answer in answers)
        assert len(toy.batches) == 1
        for teacher in teachers:
            teacher.close()


def test_an_all_black_question_is_a_question_like_any_other(tmp_path: Path) -> None:
    """Planning asks none to see shapes; one in the data set is asked."""
    with running(create_app({"toy": toy_served(open_gate(ToyTeacher()))}, Settings())) as base:
        spec = TeacherSpec.model_validate({"model": f"{base}/toy", "micro_batch": 8, "journal": str(tmp_path)})
        teacher = HttpTeacher(spec)
        assert teacher.shapes((3, 8, 8)) == {"logits": (7,)}
        with pytest.raises(TeacherError, match="input size"):
            teacher.shapes((3, 8, 9))
        assert not (tmp_path / "any").exists()
        assert torch.equal(teacher(torch.zeros(8, 3, 8, 8, dtype=torch.uint8))["logits"], torch.zeros(8, 7))
        teacher.close()


def test_planning_pays_for_nothing_that_the_build_pays_for_again(folder: Path, tmp_path: Path, serve: Serve) -> None:
    url, faulty = serve()
    spec = spec_of(folder, tmp_path / "cache", url)
    cost = estimate(spec)
    assert sum(faulty.computed.values()) == 1
    assert any("behind a URL" in warning for warning in cost.warnings)
    assert not (tmp_path / "cache").exists()
    tc.build(spec, executor="serial")
    assert sorted(faulty.computed.values()) == [1] * QUESTIONS


def test_answers_of_another_kind_of_machine_are_other_answers(served: ServedTeacher) -> None:
    """The digest names the teacher; a last bit may follow the device and the threads, too."""
    cards = [
        replace(served, **change).card(Settings(), Policy()) for change in ({}, {"threads": 2}, {"device": "cuda"})
    ]  # type: ignore[arg-type]
    cards.append(replace(served, teacher=Renamed(served.teacher)).card(Settings(), Policy()))
    assert len({key_of(card.digest, card.numerics, card.micro_batch) for card in cards}) == 4
    # Limits and names of classes decide no bit.
    again = replace(served, class_names=None).card(Settings(max_images=100), Policy())
    assert key_of(again.digest, again.numerics, 8) == key_of(cards[0].digest, cards[0].numerics, 8)


def test_an_object_store_has_no_place_beside_it(folder: Path, serve: Serve) -> None:
    url, _ = serve()
    spec = spec_of(folder, Path("x"), url).model_copy(update={"cache": "s3://bucket/cache"})
    with pytest.raises(SpecError, match=r"teacher\.journal: must name a folder"):
        with_journal(spec)
    named = spec.model_copy(update={"teacher": spec.teacher.model_copy(update={"journal": "answers"})})
    assert with_journal(named).teacher.journal == str(Path("answers").absolute())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"concurrency": 2, "model": "toy_models:PixelSums"}, "`concurrency` is for teachers behind a URL"),
        ({"budget": {"max_spend": 3}}, "max_spend needs price_per_image"),
        ({"budget": {"max_images": 0}}, "greater than 0"),
        ({"budget": {"max_image": 3}}, "not a known key.*max_images"),
        ({"concurrency": 0}, "greater than 0"),
        ({"replicas": ["http://a/x"]}, "names a URL twice"),
        ({"replicas": ["ftp://a/x"]}, "must be http"),
        ({"journal": "s3://b/x"}, "must be a folder of this machine"),
    ],
)
def test_impossible_wishes_are_refused(folder: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        colour_spec(folder, "unused", **{"model": "http://a/x", **changes})


def test_none_of_it_is_stored(folder: Path, tmp_path: Path, serve: Serve) -> None:
    url, _ = serve()
    wishes = {"concurrency": 7, "budget": {"max_images": 987}, "journal": str(tmp_path / "answers"), "timeout": 33}
    tc.build(spec_of(folder, tmp_path / "cache", url, **wishes), executor="serial")
    stored = (tmp_path / "cache" / "manifest.json").read_text()
    assert not any(name in stored for name in ("concurrency", "budget", "journal", "timeout", "replicas", "patience"))
    assert tc.open(tmp_path / "cache").manifest.first.identity == tc.open(folder / "local").manifest.first.identity


# ---------------------------------------------------------------- budgets


@pytest.mark.parametrize(
    ("low", "fits"),
    [
        ({"max_images": 45}, 5),
        ({"max_requests": 7}, 7),
        ({"max_spend": 0.8, "price_per_image": 0.02}, 5),
    ],
)
def test_a_build_stops_at_its_budget_and_goes_on_when_it_is_raised(
    folder: Path, tmp_path: Path, serve: Serve, low: dict[str, Any], fits: int
) -> None:
    url, faulty = serve(delay=0.01)
    held = []
    for _ in range(2):
        with pytest.raises(BudgetError, match="is used up") as reached:
            tc.build(spec_of(folder, tmp_path / "cache", url, budget=low), executor="serial")
        # As a notebook does with the last error, and with all that it refers to.
        held.append(reached)
        assert sorted(faulty.computed.values()) == [1] * fits
    enough = {"max_images": 8 * QUESTIONS}
    tc.build(spec_of(folder, tmp_path / "cache", url, budget=enough), executor="serial")
    assert sorted(faulty.computed.values()) == [1] * QUESTIONS
    # Builds that failed in this process have left the journal: nobody is thought to need its answers.
    assert kept_answers(tmp_path / "cache.journal") == 0
    assert data_of(tmp_path / "cache") == data_of(folder / "local")


def test_a_budget_needs_a_journal() -> None:
    with pytest.raises(TeacherError, match="counted in a journal"):
        HttpTeacher(TeacherSpec.model_validate({"model": "http://127.0.0.1:1/x", "budget": {"max_images": 8}}))


# ---------------------------------------------------------------- faults


@pytest.mark.parametrize("kind", [kind for kind in FATES if kind not in ("429", "500")])
def test_what_passes_is_sat_out(folder: Path, tmp_path: Path, serve: Serve, short_rests: None, kind: Fate) -> None:
    """Every third prediction fails; the build does not."""
    url, faulty = serve(lambda number: kind if number % 3 == 1 else "answer")
    timeout = {"timeout": 0.5} if kind == "late" else {}
    tc.build(spec_of(folder, tmp_path / "cache", url, **timeout), executor="serial")
    assert data_of(tmp_path / "cache") == data_of(folder / "local")
    assert set(faulty.delivered) == set(faulty.computed)
    account = accounts(tmp_path / "cache.journal")
    lost = 0 if kind == "503" else faulty.fates[kind]
    assert account == Account(QUESTIONS + lost, 8 * (QUESTIONS + lost), lost, 8 * lost)
    # What was computed and did not arrive is all that was computed twice.
    twice = faulty.fates[kind] if kind in ("cut", "late") else 0
    assert sum(faulty.computed.values()) == QUESTIONS + twice


@pytest.mark.parametrize("seed", range(3))
def test_any_mixture_of_faults_ends_in_the_same_cache(
    folder: Path, tmp_path: Path, serve: Serve, short_rests: None, seed: int
) -> None:
    kinds = tuple(kind for kind in FATES if kind != "late")
    url, faulty = serve(seeded(seed, 0.4, kinds))
    spec = spec_of(folder, tmp_path / "cache", url)
    for _ in range(50):
        try:
            tc.build(spec, executor="serial")
            break
        except ServiceError:
            continue
    assert data_of(tmp_path / "cache") == data_of(folder / "local")
    account = accounts(tmp_path / "cache.journal")
    lost = faulty.fates["drop"] + faulty.fates["cut"] + faulty.fates["500"] + faulty.fates["502"]
    assert account == Account(QUESTIONS + lost, 8 * (QUESTIONS + lost), lost, 8 * lost)
    assert sum(faulty.computed.values()) == QUESTIONS + faulty.fates["cut"]


def test_no_wait_is_longer_than_the_configuration_says(folder: Path, tmp_path: Path, serve: Serve) -> None:
    url, faulty = serve(lambda _: "503")
    with pytest.raises(ServiceError, match="HTTP 503"):
        tc.build(spec_of(folder, tmp_path / "cache", url, patience=0.3, concurrency=1), executor="serial")
    assert 2 <= faulty.fates["503"] <= 6
    assert accounts(tmp_path / "cache.journal") == Account()


def test_the_end_of_a_build_is_not_kept_waiting_by_retries(
    tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.retries.Retries._backed_off", lambda _self, _count: 300.0)
    url, faulty = serve(lambda number: "503" if number == 0 else "answer", delay=0.1)
    fields = ["logits"]
    spec = {"model": url, "micro_batch": 8, "fields": fields, "journal": str(tmp_path), "concurrency": 2}
    teacher = HttpTeacher(TeacherSpec.model_validate(spec))
    waiting = teacher.submit(views(8))
    wait_until(lambda: faulty.fates["503"] == 1)
    under_way = teacher.submit(views(8, seed=1))
    wait_until(lambda: faulty.fates["answer"] == 1)
    teacher.drain()
    with pytest.raises(ServiceError, match="not asked again, because the build ends"):
        waiting.result(0)
    assert under_way.result(0)
    assert accounts(tmp_path) == Account(1, 8)
    teacher.close()


def test_a_teacher_that_changes_stops_the_build_and_what_is_paid_is_kept(
    folder: Path, tmp_path: Path, serve: Serve, served: ServedTeacher
) -> None:
    app = create_app({"colour": served}, Settings())
    changed = replace(served, teacher=Renamed(served.teacher))

    def change(number: int) -> Fate:
        app.state.service.teachers["colour"] = changed if 4 <= number < 6 else served
        return "answer"

    faulty = Faulty(app, change)
    with running(faulty) as base:
        wait_until(lambda: app.state.service.not_ready() == [])
        spec = spec_of(folder, tmp_path / "cache", f"{base}/colour", concurrency=1)
        with pytest.raises(ServiceError, match=r"If-Match \(HTTP 412"):
            tc.build(spec, executor="serial")
        assert sum(faulty.computed.values()) == 4
        assert accounts(tmp_path / "cache.journal") == Account(4, 32)
        app.state.service.teachers["colour"] = served
        faulty.fate = lambda _: "answer"
        tc.build(spec, executor="serial")
    assert sorted(faulty.computed.values()) == [1] * QUESTIONS
    assert data_of(tmp_path / "cache") == data_of(folder / "local")


def test_a_full_disk_loses_no_answer_that_was_kept(
    folder: Path, tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, faulty = serve()
    spec = spec_of(folder, tmp_path / "cache", url, concurrency=1)
    real, calls = Journal.answered, []

    def full(self: Journal, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise BuildError("answers.sqlite3", "the journal cannot be used", "full", "Free space.")
        return real(self, *arguments)

    monkeypatch.setattr(Journal, "answered", full)
    with pytest.raises(BuildError, match="cannot be used"):
        tc.build(spec, executor="serial")
    tc.build(spec, executor="serial")
    assert sorted(faulty.computed.values()) == [1] * (QUESTIONS - 1) + [2]


# ---------------------------------------------------------------- replicas


def test_a_replica_that_goes_is_done_without_and_comes_back(
    folder: Path, tmp_path: Path, serve: Serve, short_rests: None
) -> None:
    first, one = serve(lambda number: "drop" if number == 2 else "answer")
    second, two = serve()
    spec = spec_of(folder, tmp_path / "cache", first, replicas=[second], concurrency=1)
    tc.build(spec, executor="serial")
    assert data_of(tmp_path / "cache") == data_of(folder / "local")
    both = one.computed + two.computed
    assert sorted(both.values()) == [1] * QUESTIONS
    assert one.fates["drop"] == 1
    assert one.fates["answer"] >= 3, "it was asked again when it was back"
    assert two.fates["answer"] >= 3


def test_a_replica_that_is_down_is_left_in_peace(
    folder: Path, tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.replicas._FIRST_REST", 30.0)
    first, one = serve(lambda number: "drop" if number else "answer")
    second, two = serve()
    tc.build(spec_of(folder, tmp_path / "cache", first, replicas=[second], concurrency=1), executor="serial")
    assert one.fates == {"answer": 1, "drop": 1}
    assert two.fates == {"answer": QUESTIONS - 1}


def test_a_replica_that_comes_back_as_another_is_refused(
    folder: Path, tmp_path: Path, served: ServedTeacher, serve: Serve, short_rests: None
) -> None:
    """The same digest on another device, or with other threads, would pass If-Match and give other bits."""
    app = create_app({"colour": served}, Settings())
    other = replace(served, threads=2)

    def fate(number: int) -> Fate:
        if number != 1:
            return "answer"
        app.state.service.teachers["colour"] = other
        return "drop"

    second, _ = serve()
    with running(Faulty(app, fate)) as base:
        wait_until(lambda: app.state.service.not_ready() == [])
        spec = spec_of(folder, tmp_path / "cache", second, replicas=[f"{base}/colour"], concurrency=1)
        with pytest.raises(ServiceError, match="must be a replica of the same teacher: numerics"):
            tc.build(spec, executor="serial")


def test_a_replica_that_is_not_there_from_the_first_is_no_hindrance(folder: Path, tmp_path: Path, serve: Serve) -> None:
    url, faulty = serve()
    for place, urls in enumerate((["http://127.0.0.1:1/colour", url], [url, "http://127.0.0.1:1/colour"])):
        cache = tmp_path / str(place)
        tc.build(spec_of(folder, cache, urls[0], replicas=urls[1:]), executor="serial")
        assert data_of(cache) == data_of(folder / "local")
        assert accounts(tmp_path / f"{place}.journal") == Account(QUESTIONS, 8 * QUESTIONS)
    assert sum(faulty.computed.values()) == 2 * QUESTIONS


def test_a_replica_of_another_teacher_is_refused(folder: Path, tmp_path: Path, serve: Serve) -> None:
    url, _ = serve()
    other, faulty = serve(served=toy_served(open_gate(ToyTeacher()), name="colour"))
    with pytest.raises(ServiceError, match="must be a replica of the same teacher: digest"):
        tc.build(spec_of(folder, tmp_path / "cache", url, replicas=[other]), executor="serial")
    assert faulty.fates.total() == 0
    slower, _ = serve(served=replace(open_served(colour_spec(folder, "unused")), threads=2, library=None))
    with pytest.raises(ServiceError, match="must be a replica of the same teacher: numerics"):
        tc.build(spec_of(folder, tmp_path / "cache", url, replicas=[slower]), executor="serial")


def test_our_own_budget_is_the_same_at_every_replica(
    folder: Path, tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, one = serve(lambda number: "429" if number == 0 else "answer")
    second, _ = serve()
    waits: list[float] = []
    real = threading.Event.wait

    def wait(self: threading.Event, timeout: float | None = None) -> bool:
        waits.append(-1.0 if timeout is None else timeout)
        return real(self, timeout)

    monkeypatch.setattr("services.retries.retry_after", lambda error: 0.123 if "429" in str(error) else None)
    monkeypatch.setattr(threading.Event, "wait", wait)
    tc.build(spec_of(folder, tmp_path / "cache", first, replicas=[second], concurrency=1), executor="serial")
    assert 0.123 in waits
    assert one.fates["429"] == 1


def test_the_command_says_what_was_asked_for(
    folder: Path, tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    url, _ = serve()
    spec, config = spec_of(folder, tmp_path / "cache", url), tmp_path / "build.yaml"
    described = spec.model_dump(mode="json")
    described["teacher"]["budget"] = {"price_per_image": "0.05"}
    config.write_text(yaml.safe_dump(described))
    said = []
    for more in ([], ["--json"]):
        monkeypatch.setattr("sys.argv", ["teacher-cache", "build", str(config), "--executor", "serial", *more])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert not ended.value.code
        said.append(capsys.readouterr().out)
    assert f"{QUESTIONS} requests of {8 * QUESTIONS} images for 4.00, by all builds with this journal" in " ".join(
        said[0].replace("│", " ").split()
    )
    assert json.loads(said[1])["paid"] == {"requests": QUESTIONS, "images": 8 * QUESTIONS, "spent": "4.00"}
