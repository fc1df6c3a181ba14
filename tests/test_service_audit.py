"""The audit: lines that cannot be changed unnoticed, across crashes, restarts and rotation."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_service_models import ToyTeacher, open_gate, serving, toy_served, views

from services import keys
from services.__main__ import main
from services.audit import Audit, head_of
from services.audit_lines import NOTHING, Place, line_after
from services.audit_verify import Verdict, verify
from services.policy import Policy
from services.state_folder import StateFolder
from services.wire import pack_images
from teacher_cache.errors import SpecError
from teacher_cache.fingerprint import canonical_json

LINES = 8


def write(path: Path, count: int, first: int = 0) -> None:
    """Opens the audit, writes so many lines, each of its own commit, and closes it."""
    audit = Audit(path)
    for number in range(first, first + count):
        audit.append({"key": f"key {number}", "images": number})
        audit.commit()
    audit.close()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[bytes]]:
    """An audit, and its lines."""
    path = tmp_path_factory.mktemp("audit") / "audit.jsonl"
    write(path, LINES)
    return path, path.read_bytes().splitlines(keepends=True)


def judged(written: tuple[Path, list[bytes]], content: bytes) -> Verdict:
    """The verdict on other content with the same head."""
    altered = written[0].with_name("altered.jsonl")
    altered.write_bytes(content)
    head_of(altered).write_bytes(head_of(written[0]).read_bytes())
    return verify([altered])


def first_line(verdict: Verdict) -> int:
    """Where the first break is."""
    return verdict.breaks[0].line


def rewritten(line: bytes, **facts: Any) -> bytes:
    """A line with other facts, and the hash that fits them."""
    body = {**json.loads(line), **facts}
    del body["hash"]
    return canonical_json({**body, "hash": hashlib.sha256(canonical_json(body)).hexdigest()}) + b"\n"


# ---------------------------------------------------------------- what verify finds


def test_what_was_written_holds(written: tuple[Path, list[bytes]]) -> None:
    verdict = verify([written[0]])
    assert verdict.lines == LINES
    assert verdict.breaks == ()
    assert verdict.end == json.loads(written[1][-1])["hash"]
    assert json.loads(written[1][0])["previous"] == NOTHING
    assert judged(written, b"".join(written[1])).breaks == ()


def test_every_altered_byte_is_found_in_its_line(written: tuple[Path, list[bytes]]) -> None:
    lines = written[1][:3]
    head = json.loads(lines[-1])["hash"]
    altered, tried = written[0].with_name("bytes.jsonl"), 0
    for number, line in enumerate(lines, 1):
        for place in range(len(line)):
            for other in (line[place] ^ 1, ord(" "), ord("\n")):
                if other == line[place]:
                    continue
                bad = line[:place] + bytes([other]) + line[place + 1 :]
                altered.write_bytes(b"".join([*lines[: number - 1], bad, *lines[number:]]))
                assert first_line(verify([altered], head=head)) == number, (number, place, other)
                tried += 1
    assert tried > 1500


@given(st.data())
@settings(max_examples=600)
def test_every_rearrangement_is_found_where_it_begins(written: tuple[Path, list[bytes]], data: st.DataObject) -> None:
    lines = written[1]
    order = data.draw(st.lists(st.integers(0, LINES - 1), max_size=LINES + 3))
    if order == list(range(LINES)):
        return
    verdict = judged(written, b"".join(lines[number] for number in order))
    begins = next((place for place, number in enumerate(order) if place != number), len(order))
    assert first_line(verdict) == begins + 1


@given(st.integers(0, LINES - 1), st.integers(0, LINES - 1))
@settings(max_examples=100)
def test_a_swap_is_found(written: tuple[Path, list[bytes]], one: int, other: int) -> None:
    lines = list(written[1])
    lines[one], lines[other] = lines[other], lines[one]
    verdict = judged(written, b"".join(lines))
    assert (verdict.breaks == ()) == (one == other)
    assert one == other or first_line(verdict) == min(one, other) + 1


@given(st.data())
@settings(max_examples=400)
def test_a_cut_anywhere_is_found(written: tuple[Path, list[bytes]], data: st.DataObject) -> None:
    content = b"".join(written[1])
    place = data.draw(st.integers(0, len(content) - 1))
    verdict = judged(written, content[:place])
    assert first_line(verdict) == content[:place].count(b"\n") + 1


@given(st.integers(0, LINES - 1), st.integers(-5, 20))
@settings(max_examples=200)
def test_a_line_replaced_with_a_fitting_hash_is_found_behind_it(
    written: tuple[Path, list[bytes]], number: int, images: int
) -> None:
    lines = list(written[1])
    lines[number] = rewritten(lines[number], images=images)
    if lines == written[1]:
        return
    assert first_line(judged(written, b"".join(lines))) == number + 2


@given(st.integers(0, LINES), st.integers(0, LINES - 1), st.booleans())
@settings(max_examples=200)
def test_an_inserted_line_is_found(written: tuple[Path, list[bytes]], number: int, copied: int, fitting: bool) -> None:
    lines = list(written[1])
    before = json.loads(lines[number - 1]) if number else {"sequence": 0, "hash": NOTHING}
    forged, _ = line_after(Place(before["sequence"], before["hash"]), {"key": "mallory", "images": 0})
    lines.insert(number, forged if fitting else lines[copied])
    # One that fits is found at the line that it pushed away, or by the head.
    found = first_line(judged(written, b"".join(lines)))
    assert found in ((number + 2,) if fitting else (number + 1, number + 2))


def test_a_whole_chain_written_anew_is_found_by_a_head_kept_elsewhere(
    written: tuple[Path, list[bytes]], tmp_path: Path
) -> None:
    kept = verify([written[0]]).end
    write(tmp_path / "audit.jsonl", LINES, first=1)
    assert verify([tmp_path / "audit.jsonl"]).breaks == ()
    assert first_line(verify([tmp_path / "audit.jsonl"], head=kept)) == LINES + 1


# ---------------------------------------------------------------- restarts, rotation, crashes


def test_the_chain_goes_on_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    for first in (0, 3, 6):
        write(path, 3, first)
    assert verify([path]).lines == 9
    assert verify([path]).breaks == ()
    assert path.stat().st_mode & 0o777 == 0o600
    assert head_of(path).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("running", [True, False])
def test_the_chain_goes_on_in_a_new_file_when_one_is_moved_away(tmp_path: Path, running: bool) -> None:
    path, old = tmp_path / "audit.jsonl", tmp_path / "2026.jsonl"
    write(path, 2)
    if running:
        audit = Audit(path)
        audit.append({"key": "a"})
        audit.commit()
        path.rename(old)
        for key in "bc":
            audit.append({"key": key})
            audit.append({"key": key})
            audit.commit()
            assert path.exists()
        audit.close()
        assert old.read_bytes().count(b"\n") == 3
    else:
        path.rename(old)
    write(path, 2, 5)
    verdict = verify([old, path])
    assert verdict.breaks == ()
    assert verdict.lines == (9 if running else 4)
    # Alone, the second neither begins nor is it forgotten that it does not; and the first has no end of its own.
    assert first_line(verify([path])) == 1
    last = json.loads(old.read_bytes().splitlines()[-1])["hash"]
    assert verify([path], after=last).breaks == ()
    assert verify([old], head=last).breaks == ()
    with pytest.raises(SpecError, match="where the chain ends"):
        verify([old])
    assert first_line(verify([path], after=NOTHING)) == 1
    # A whole file that is missing between two, or at the end.
    assert verify([old], head=verdict.end).breaks


def test_what_a_crash_leaves_is_taken_over_or_cut(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    write(path, 2)
    behind = head_of(path).read_bytes()
    write(path, 2, 2)
    # The lines are on the disk, the head is not, and a fifth line is torn.
    head_of(path).write_bytes(behind)
    with path.open("ab") as file:
        file.write(path.read_bytes()[:40])
    assert {one.line for one in verify([path]).breaks} == {5, 6}
    Audit(path).close()
    assert verify([path]).lines == 4
    assert verify([path]).breaks == ()
    write(path, 1, 4)
    assert verify([path]).breaks == ()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def forge(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b'{"key":"mallory"}\n')


def forget(path: Path) -> None:
    head_of(path).unlink()


def scribble(path: Path) -> None:
    head_of(path).write_bytes(b"0 0 0\n")


@pytest.mark.parametrize("harm", [cut, forge, forget, scribble])
def test_a_server_does_not_go_on_with_what_was_tampered_with(tmp_path: Path, harm: Callable[[Path], None]) -> None:
    path = tmp_path / "audit.jsonl"
    write(path, 2)
    harm(path)
    content = path.read_bytes()
    with pytest.raises(SpecError, match="audit"):
        Audit(path)
    assert path.read_bytes() == content, "evidence"


def test_lines_of_a_failed_commit_leave_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "audit.jsonl"
    write(path, 1)
    audit = Audit(path)
    audit.append({"key": "lost"})

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            audit.commit()
    audit.rollback()
    audit.append({"key": "kept"})
    audit.commit()
    audit.close()
    assert verify([path]).breaks == ()
    assert b"lost" not in path.read_bytes()
    assert verify([path]).lines == 2


def test_a_commit_waits_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, synced = tmp_path / "audit.jsonl", []
    audit = Audit(path)
    audit.append({"key": "a"})
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append((os.fstat(handle).st_ino, os.fstat(handle).st_size)))
    audit.commit()
    audit.close()
    assert synced == [(path.stat().st_ino, path.stat().st_size)]


# ---------------------------------------------------------------- in the server

PREDICT = "/v1/teachers/toy/predict"
TENSORS = {"Content-Type": "application/safetensors"}


def lines_of(state: Path) -> list[dict[str, Any]]:
    """The audit of a server."""
    return [json.loads(line) for line in (state / "audit.jsonl").read_bytes().splitlines()]


def test_every_answer_and_every_refusal_has_its_line(tmp_path: Path) -> None:
    key = keys.add(StateFolder(tmp_path), "alice", Policy(outputs=("topk",), images_per_day=4))
    headers = {"Authorization": f"Bearer {key}", **TENSORS}
    with serving(toy_served(open_gate(ToyTeacher())), state=tmp_path) as client:

        def ask(count: int, query: str = "?output=topk", **more: str) -> httpx.Response:
            return client.post(PREDICT + query, content=pack_images(views(count)), headers={**headers, **more})

        statuses = [
            ask(3, **{"X-Request-Id": "mine"}).status_code,
            # On the disk before the answer is here.
            len(lines_of(tmp_path)),
            ask(2).status_code,
            ask(1, "?output=probs").status_code,
            ask(1, "?output=nonsense").status_code,
            ask(1, Authorization="Bearer wrong-secret").status_code,
            client.get("/v1/teachers/toy", headers=headers).status_code,
            client.get("/v1/usage", headers=headers).status_code,
            client.get("/wrong-secret", headers=headers).status_code,
            client.get("/livez").status_code,
        ]
    assert statuses == [200, 1, 429, 403, 400, 401, 200, 200, 404, 200]
    found = lines_of(tmp_path)
    told = ("key", "route", "teacher", "images", "outputs", "decision", "status", "limit")
    predict = "/v1/teachers/{name}/predict"
    assert [tuple(line[name] for name in told) for line in found] == [
        ("alice", predict, "toy", 3, ["topk"], "answered", 200, None),
        ("alice", predict, "toy", 2, ["topk"], "refused", 429, "images_per_day"),
        ("alice", predict, "toy", 1, ["probs"], "refused", 403, "outputs"),
        ("alice", predict, None, 0, [], "refused", 400, None),
        (None, None, None, 0, [], "refused", 401, None),
        ("alice", "/v1/teachers/{name}", "toy", 0, [], "answered", 200, None),
        ("alice", "/v1/usage", None, 0, [], "answered", 200, None),
        ("alice", None, None, 0, [], "refused", 404, None),
    ]
    assert found[0]["request_id"] == "mine"
    text = (tmp_path / "audit.jsonl").read_text()
    assert key not in text
    assert "wrong-secret" not in text
    assert verify([tmp_path / "audit.jsonl"]).breaks == ()


def test_nothing_leaves_that_cannot_be_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = keys.add(StateFolder(tmp_path), "alice", Policy())
    headers = {"Authorization": f"Bearer {key}"}
    with serving(toy_served(open_gate(ToyTeacher())), state=tmp_path) as client:

        def fails(audit: Audit) -> None:
            raise OSError(28, "No space left on device: /secret/path")

        with monkeypatch.context() as patch:
            patch.setattr(Audit, "commit", fails)
            for place in ("/v1/teachers", "/nowhere"):
                answer = client.get(place, headers=headers)
                assert answer.status_code == 503
                assert answer.json()["request_id"] == answer.headers["x-request-id"]
                assert "/secret" not in answer.text
            assert client.get("/v1/teachers").status_code == 503
            assert client.get("/livez").status_code == 200
        assert client.get("/v1/teachers", headers=headers).status_code == 200
    assert [line["status"] for line in lines_of(tmp_path)] == [200]
    assert verify([tmp_path / "audit.jsonl"]).breaks == ()


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The command's exit code."""
    monkeypatch.setattr(sys, "argv", ["teacher-serve", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_the_command_says_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "audit.jsonl"
    write(path, 4)
    assert run(monkeypatch, "audit", "verify", path) == 0
    assert capsys.readouterr().out.startswith("4 lines, all of them as they were written; the last is ")
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], *lines[2:]]))
    assert run(monkeypatch, "audit", "verify", path) == 1
    shown = capsys.readouterr()
    assert f"{path}:2: must be number 2" in shown.out
    assert f"{path}:2" in shown.err
    assert run(monkeypatch, "audit", "verify", tmp_path / "none.jsonl") == 2
    assert "--head" in capsys.readouterr().err
