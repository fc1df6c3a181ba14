"""The journal: a paid answer is found again, bit for bit, whoever dies; what leaves is counted, exactly."""

from __future__ import annotations

import json
import logging
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_service_models import views, wait_until

from services import wire
from services.account import Account
from services.journal import Journal, Ticket
from services.journal_file import NAME
from teacher_cache.errors import BudgetError, BuildError
from teacher_cache.service_spec import BudgetSpec

QUESTION = b"q" * 16
ANSWER = {"logits": torch.tensor([[1.5, -0.0, float("nan"), float("inf")]]), "feature:x": torch.ones(1, 2, 3)}


@pytest.fixture
def open_journal(tmp_path: Path) -> Iterator[Callable[..., Journal]]:
    """Opens journals in one folder; all are closed at the end."""
    opened: list[Journal] = []

    def make(teacher: str = "t", seconds: float = 60.0, **budget: Any) -> Journal:
        opened.append(Journal(tmp_path / "journal", teacher, BudgetSpec(**budget), seconds))
        return opened[-1]

    yield make
    for journal in opened:
        journal.close()


def taken(journal: Journal, question: bytes = QUESTION, images: int = 8) -> Ticket:
    """A ticket that must be had."""
    ticket = journal.leave(question, ("logits",), images)
    assert ticket is not None
    return ticket


def keep(journal: Journal, answer: dict[str, torch.Tensor] = ANSWER, question: bytes = QUESTION) -> None:
    """Asks and keeps an answer."""
    journal.answered(taken(journal, question), question, answer)


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    """Whether two answers have the same bits."""
    bits = [{name: (values.shape, values.numpy().tobytes()) for name, values in one.items()} for one in (ours, theirs)]
    return bits[0] == bits[1]


# ---------------------------------------------------------------- answers


def test_an_answer_is_found_again_bit_for_bit_by_whoever_opens(open_journal: Callable[..., Journal]) -> None:
    keep(open_journal())
    found = open_journal().find(QUESTION, tuple(ANSWER))
    assert same(found, ANSWER)
    assert list(open_journal().find(QUESTION, ("logits",))) == ["logits"]


def test_it_is_the_answer_of_one_teacher_to_one_question(
    open_journal: Callable[..., Journal], caplog: pytest.LogCaptureFixture
) -> None:
    journal = open_journal()
    keep(journal)
    assert open_journal("another").find(QUESTION, ("logits",)) == {}
    assert journal.find(b"r" * 16, ("logits",)) == {}
    assert journal.find(QUESTION, ("feature:y",)) == {}
    assert not caplog.records, "another's answer is no damage"


def test_the_first_answer_stays(open_journal: Callable[..., Journal]) -> None:
    journal, other = open_journal(), open_journal()
    first = taken(journal)
    late = {"logits": torch.zeros(1, 4)}
    assert same(journal.answered(first, QUESTION, ANSWER), ANSWER)
    ticket = other.leave(QUESTION, ("feature:y",), 8)
    assert ticket is not None
    assert same(other.answered(ticket, QUESTION, late), {"logits": ANSWER["logits"]})


def test_questions_are_exact_bytes_in_their_layout() -> None:
    one = views(8)
    assert wire.identity_of(one) == wire.identity_of(one.clone())
    assert wire.identity_of(one) == wire.identity_of(one.to(memory_format=torch.channels_last))
    other = one.clone()
    other[7, 2, 7, 7] ^= 1
    turned = one.roll(1, 0)
    assert len({wire.identity_of(item) for item in (one, other, turned, one[:7], one.reshape(4, 6, 8, 8))}) == 5


def test_a_damaged_answer_is_none_and_that_is_said(
    open_journal: Callable[..., Journal], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    journal = open_journal()
    keep(journal)
    _change(tmp_path, "UPDATE answers SET data = substr(data, 1, length(data) - 1) || x'ff' WHERE field = 'logits'")
    with caplog.at_level(logging.WARNING, "services"):
        assert list(journal.find(QUESTION, tuple(ANSWER))) == ["feature:x"]
    assert "damaged and is asked for again (logits)" in caplog.text
    assert journal.account().damaged == 1
    assert "1 answers in the journal were damaged" in journal.account().notes(BudgetSpec())[0]
    keep(journal)
    assert same(journal.find(QUESTION, tuple(ANSWER)), ANSWER)


@pytest.mark.parametrize("column", ["question = x'00'", "field = 'feature:y'", "teacher = 'u'", "checksum = 1"])
def test_an_answer_in_anothers_place_is_damaged(
    open_journal: Callable[..., Journal], tmp_path: Path, column: str
) -> None:
    journal = open_journal()
    keep(journal, {"logits": ANSWER["logits"]})
    _change(tmp_path, f"UPDATE answers SET {column}")
    reader = open_journal("u" if column.startswith("teacher") else "t")
    assert reader.find(b"\0" if column.startswith("question") else QUESTION, ("logits", "feature:y")) == {}
    assert reader.account().damaged == 1


def test_a_file_that_is_no_journal_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(b"not a database at all, but something dear to its owner" * 100)
    with pytest.raises(BuildError, match=r"journal is damaged.*recover.*move the folder away"):
        Journal(tmp_path, "t", BudgetSpec(), 1)
    assert (tmp_path / NAME).read_bytes().startswith(b"not a database")


def test_another_versions_journal_is_refused(open_journal: Callable[..., Journal], tmp_path: Path) -> None:
    open_journal()
    _change(tmp_path, "PRAGMA user_version = 2")
    with pytest.raises(BuildError, match=r"version 1 \(found: 2\)"):
        open_journal()


def test_a_folder_that_cannot_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BuildError, match="cannot be made") as refused:
        Journal(tmp_path / "file" / "journal", "t", BudgetSpec(), 1)
    assert "teacher.journal" in refused.value.hint


def test_commits_are_on_the_disk_before_they_count(open_journal: Callable[..., Journal]) -> None:
    with open_journal()._file.reading() as db:
        assert db.execute("PRAGMA synchronous").fetchone() == (2,)
        assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)


@settings(max_examples=20)
@given(st.data())
def test_a_power_failure_takes_the_last_answers_at_most(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """The log of commits is cut anywhere: what was kept before is found, exactly, and nothing else is."""
    folder = tmp_path_factory.mktemp("torn")
    journal = Journal(folder / "whole", "t", BudgetSpec(), 60)
    answers = {bytes([number]) * 16: {"logits": torch.full((2, 3), float(number))} for number in range(6)}
    try:
        for question, answer in answers.items():
            keep(journal, answer, question)
        (folder / "torn").mkdir()
        shutil.copy(folder / "whole" / NAME, folder / "torn" / NAME)
        log = (folder / "whole" / f"{NAME}-wal").read_bytes()
    finally:
        journal.close()
    cut = data.draw(st.integers(0, len(log)))
    (folder / "torn" / f"{NAME}-wal").write_bytes(log[:cut])
    again = Journal(folder / "torn", "t", BudgetSpec(), 60)
    try:
        found = [again.find(question, ("logits",)) for question in answers]
    finally:
        again.close()
    kept = sum(map(bool, found))
    assert all(same(one, answer) for one, answer in zip(found[:kept], answers.values(), strict=False))
    assert kept == len(answers) or cut < len(log)
    shutil.rmtree(folder)


def _change(tmp_path: Path, statement: str) -> None:
    db = sqlite3.connect(tmp_path / "journal" / NAME, isolation_level=None)
    db.execute(statement)
    db.close()


# ---------------------------------------------------------------- counting


def test_what_leaves_is_counted_and_what_was_refused_is_not(open_journal: Callable[..., Journal]) -> None:
    journal = open_journal()
    ticket = taken(journal)
    assert open_journal().account() == Account(1, 8)
    journal.refused(ticket)
    assert journal.account() == Account(0, 0)
    journal.lost(taken(journal))
    assert journal.account() == Account(1, 8, 1, 8)
    keep(journal)
    assert journal.account() == Account(2, 16, 1, 8)
    assert open_journal("another").account() == Account()
    priced = BudgetSpec.model_validate({"price_per_image": 0.25})
    assert (
        "1 requests of 8 images (2.00) may have been answered and paid for in vain"
        in journal.account().notes(priced)[0]
    )


def test_a_question_that_is_being_asked_or_answered_waits(open_journal: Callable[..., Journal]) -> None:
    journal, other = open_journal(), open_journal()
    ticket = taken(journal)
    assert other.leave(QUESTION, ("logits",), 8) is None
    assert journal.leave(QUESTION, ("logits",), 8) is None
    journal.answered(ticket, QUESTION, ANSWER)
    # Answered between another's look and its try: there is nothing to ask.
    assert other.leave(QUESTION, ("logits",), 8) is None
    assert other.leave(QUESTION, ("logits", "feature:y"), 8) is not None


@pytest.mark.parametrize(
    ("budget", "fits", "name"),
    [
        ({"max_requests": 3}, 3, "max_requests"),
        ({"max_images": 24}, 3, "max_images"),
        ({"max_images": 31}, 3, "max_images"),
        ({"max_spend": "2.4", "price_per_image": "0.1"}, 3, "max_spend"),
        ({"max_spend": 2.39, "price_per_image": 0.1}, 2, "max_spend"),
        ({"max_images": 24, "max_spend": 9, "price_per_image": 0.1, "max_requests": 9}, 3, "max_images"),
    ],
)
def test_a_budget_is_exact(open_journal: Callable[..., Journal], budget: dict[str, Any], fits: int, name: str) -> None:
    journal = open_journal(**budget)
    for number in range(fits):
        keep(journal, question=bytes([number]) * 16)
    with pytest.raises(BudgetError, match="is used up") as reached:
        journal.leave(QUESTION, ("logits",), 8)
    assert reached.value.field == f"teacher.budget.{name}"
    assert "All that was answered is kept: raise it" in reached.value.hint
    assert journal.account() == Account(fits, 8 * fits)
    higher = open_journal(max_requests=fits + 1)
    assert higher.leave(QUESTION, ("logits",), 8) is not None


def test_the_last_room_is_waited_for(open_journal: Callable[..., Journal]) -> None:
    journal, other = open_journal(max_images=8), open_journal(max_images=8)
    ticket = taken(journal)
    assert other.leave(b"r" * 16, ("logits",), 8) is None
    journal.refused(ticket)
    ticket = taken(other, b"r" * 16)
    assert journal.leave(QUESTION, ("logits",), 8) is None
    other.lost(ticket)
    with pytest.raises(BudgetError):
        journal.leave(QUESTION, ("logits",), 8)


def test_many_writers_never_spend_too_much(open_journal: Callable[..., Journal]) -> None:
    """Each has a file handle of its own, as processes have; the lock is the file's."""
    journals = [open_journal(max_images=8 * 50) for _ in range(4)]
    spent = [0] * len(journals)

    def spend(place: int) -> None:
        for number in range(40):
            question = bytes([place, number]) * 8
            try:
                while (ticket := journals[place].leave(question, ("logits",), 8)) is None:
                    pass
            except BudgetError:
                return
            journals[place].answered(ticket, question, {"logits": torch.full((1, 1), float(number))})
            spent[place] += 1

    threads = [threading.Thread(target=spend, args=(place,)) for place in range(len(journals))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(spent) == 50
    assert journals[0].account() == Account(50, 400)
    for place, count in enumerate(spent):
        assert all(journals[0].find(bytes([place, number]) * 8, ("logits",)) for number in range(count))


# ---------------------------------------------------------------- other processes

OTHER = """
import sys, time
from pathlib import Path
from services.journal import Journal
from teacher_cache.service_spec import BudgetSpec
journal = Journal(Path(sys.argv[1]), "t", BudgetSpec(), 60)
assert journal.leave(b"q" * 16, ("logits",), 8) is not None
print("asked", flush=True)
time.sleep(60)
"""


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has asked a question, and waits for the answer."""
    command = [sys.executable, "-c", OTHER, str(tmp_path / "journal")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "asked\n"
    yield process
    process.kill()
    process.communicate()


def test_a_try_dies_with_its_process_and_stays_counted(
    open_journal: Callable[..., Journal], tmp_path: Path, other: subprocess.Popen[str]
) -> None:
    journal = open_journal()
    # However long it takes: a process of this machine can be looked at.
    _change(tmp_path, "UPDATE tries SET until = 5")
    assert journal.leave(QUESTION, ("logits",), 8) is None
    assert journal.account() == Account(1, 8)
    other.kill()
    other.wait()
    keep(journal)
    assert journal.account() == Account(2, 16, 1, 8)


def test_a_process_of_another_machine_is_believed_for_a_while(
    open_journal: Callable[..., Journal], tmp_path: Path
) -> None:
    journal = open_journal(seconds=60.0)
    body = json.dumps(asdict(replace(journal._me, id="other", machine="elsewhere")))
    _change(tmp_path, f"INSERT INTO writers VALUES ('other', '{body}', 0)")
    _change(tmp_path, "INSERT INTO tries VALUES (7, 't', x'71717171717171717171717171717171', 8, 'other', 9e9)")
    _change(tmp_path, "UPDATE accounts SET requests = 1, images = 8")
    assert journal.leave(QUESTION, ("logits",), 8) is None
    _change(tmp_path, "UPDATE tries SET until = 5")
    keep(journal)
    assert journal.account() == Account(2, 16, 1, 8)


def test_answers_go_when_nobody_needs_them_and_the_account_stays(
    open_journal: Callable[..., Journal], tmp_path: Path, other: subprocess.Popen[str]
) -> None:
    journal, apart = open_journal(), open_journal("another")
    wide = {"logits": torch.rand(64, 1000)}
    for number in range(20):
        keep(journal, wide, bytes([number]) * 16)
    keep(apart)
    before = journal.account()
    assert not journal.forget(patience=0.1)
    other.kill()
    other.wait()
    assert not journal.forget(patience=0.1), "`apart` is at work in this process"
    apart.close()
    assert journal.forget()
    assert journal.find(bytes(16), ("logits",)) == {}
    wait_until(lambda: sum(path.stat().st_size for path in (tmp_path / "journal").iterdir()) < 200_000)
    again = journal.account()
    assert (again.requests, again.images) == (before.requests, before.images)
    assert same(open_journal("another").find(QUESTION, tuple(ANSWER)), ANSWER)
