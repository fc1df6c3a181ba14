"""Metrics: what is counted is what happened, names are conventional, labels are few; and where the time went."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families
from toy_service_models import ToyTeacher, colour_spec, open_gate, picture, running, toy_served, views, wait_until

from services import keys
from services.app import create_app
from services.page import PATHS
from services.policy import Policy
from services.settings import Settings
from services.state_folder import StateFolder
from services.teachers import open_served
from services.timing import PARTS, Spent
from services.wire import pack_images
from teacher_cache.build import build

PREDICT = "/v1/teachers/toy/predict"
TEMPLATE = "/v1/teachers/{name}/predict"
TENSORS = {"Content-Type": "application/safetensors"}
Value = Callable[..., float]


@contextmanager
def observed(teacher: ToyTeacher, **given: Any) -> Iterator[tuple[httpx.Client, Value, FastAPI]]:
    """A warm service, and how to read a sample of its metrics; 0 where there is none."""
    app = create_app({"toy": toy_served(teacher)}, Settings(**given))

    def value(name: str, **labels: str) -> float:
        found = app.state.metrics.registry.get_sample_value(f"teacher_serve_{name}", labels)
        return 0.0 if found is None else float(found)

    with running(app) as url, httpx.Client(base_url=url, timeout=20) as client:
        wait_until(lambda: client.get("/readyz").status_code == 200)
        yield client, value, app


def families(app: FastAPI) -> dict[str, Metric]:
    """All metrics, as Prometheus's own parser reads them."""
    text, media_type = app.state.metrics.text("")
    assert media_type.startswith("text/plain; version=")
    return {family.name: family for family in text_string_to_metric_families(text.decode())}


def parts(answer: httpx.Response) -> dict[str, float]:
    """`Server-Timing` in milliseconds; it must be well-formed."""
    found = [re.fullmatch(r"([a-z]+);dur=(\d+\.\d{3})", item) for item in answer.headers["server-timing"].split(", ")]
    return {one[1]: float(one[2]) for one in found if one is not None or pytest.fail("malformed")}


def in_chunks(body: bytes) -> Iterator[bytes]:
    """Slowly enough to arrive one by one."""
    for place in range(0, len(body), 100):
        yield body[place : place + 100]
        time.sleep(0.005)


def test_what_happened_is_counted() -> None:
    with observed(open_gate(ToyTeacher()), max_body_bytes=10_000) as (client, value, _):
        body = pack_images(views(3))
        answers = [client.post(PREDICT, content=sent, headers=TENSORS) for sent in (body, in_chunks(body))]
        client.post(f"{PREDICT}?k=1", content=body, headers=TENSORS)
        client.post(f"{PREDICT}?fields=none", content=body, headers=TENSORS)
        client.post(PREDICT, content=bytes(10_001), headers=TENSORS)
        wait_until(lambda: value("requests_in_flight") == 0)
        asked = {"route": TEMPLATE, "method": "POST", "teacher": "toy"}
        assert value("requests_total", status="200", **asked) == 2
        assert value("requests_total", status="400", **asked) == 2
        assert value("requests_total", status="413", **asked) == 1
        assert value("request_duration_seconds_count", route=TEMPLATE) == 5
        assert value("images_total", teacher="toy") == 6
        assert value("batch_rows_sum", teacher="toy") == 6
        assert value("batch_rows_count", teacher="toy") == 2
        assert value("batch_duration_seconds_count", teacher="toy") == 2
        assert value("queue_wait_seconds_count", teacher="toy") == 2
        assert value("received_bytes_total") == 2 * len(body)
        probes = value("requests_total", route="/readyz", method="GET", status="200", teacher="")
        assert probes >= 1
        sent = sum(len(answer.content) for answer in answers)
        assert value("sent_bytes_total") > sent + probes


def test_what_is_under_way_shows_in_the_gauges() -> None:
    teacher = ToyTeacher()
    with observed(teacher) as (client, value, app):
        batcher = app.state.service.batchers["toy"]
        inside = batcher.submit(views(1, 9), ("logits",), "someone")
        assert teacher.entered.acquire(timeout=20)
        waiting = batcher.submit(views(5), ("logits",), "someone")
        assert value("queue_images", teacher="toy") == 5
        assert (value("ready"), value("draining")) == (1, 0)
        app.state.service.draining = True
        assert (value("ready"), value("draining")) == (0, 1)
        teacher.gate.set()
        inside.result(20), waiting.result(20)
        assert value("queue_images", teacher="toy") == 0
        assert client.get("/livez").status_code == 200


def test_a_request_is_in_flight_until_it_is_answered() -> None:
    teacher = ToyTeacher()
    with observed(teacher) as (client, value, _):
        with pytest.raises(httpx.ReadTimeout):
            client.post(PREDICT, content=pack_images(views(1)), headers=TENSORS, timeout=0.3)
        wait_until(lambda: value("requests_in_flight") == 0)
        assert value("requests_total", route=TEMPLATE, method="POST", status="408", teacher="toy") == 1
        teacher.gate.set()


def test_a_limit_that_refuses_is_counted_and_the_books_are_timed(tmp_path: Path) -> None:
    key = keys.add(StateFolder(tmp_path / "state"), "alice", Policy(outputs=("topk",), images_per_day=2))
    with observed(open_gate(ToyTeacher()), state=tmp_path / "state") as (client, value, app):
        headers = {**TENSORS, "Authorization": f"Bearer {key}"}
        body = pack_images(views(2))
        assert client.post(PREDICT, content=body, headers=headers).status_code == 403
        assert client.post(f"{PREDICT}?output=topk", content=body, headers=headers).status_code == 200
        assert client.post(f"{PREDICT}?output=topk", content=body, headers=headers).status_code == 429
        wait_until(lambda: value("requests_in_flight") == 0)
        assert value("images_total", teacher="toy") == 2
        assert value("refusals_total", limit="outputs") == 1
        assert value("refusals_total", limit="images_per_day") == 1
        assert value("books_write_seconds_count", book="usage") == 1
        assert value("books_write_seconds_count", book="audit") == 3
        text = app.state.metrics.text("")[0].decode()
        assert "alice" not in text
        assert key not in text


def test_what_the_cache_answered_is_counted(tmp_path: Path) -> None:
    spec = colour_spec(tmp_path, "cache")
    build(spec, "serial")
    app = create_app({"colour": open_served(spec)}, Settings())

    def count(result: str) -> float:
        asked = {"teacher": "colour", "result": result}
        return app.state.metrics.registry.get_sample_value("teacher_serve_cache_answers_total", asked) or 0.0

    with running(app) as url, httpx.Client(base_url=f"{url}/v1/teachers/colour", timeout=20) as client:
        answer = client.post("/predict", json={"keys": ["images/0", "images/1", "none"], "views": 1})
        assert answer.json()["status"] == ["cached", "cached", "unknown"]
        assert "cache" in parts(answer)
        client.post("/predict?cache=bypass", json={"keys": ["images/0"]})
        client.post("/predict", content=picture("PNG"), headers={"Content-Type": "image/png"})
        wait_until(lambda: count("hit") + count("miss") == 4)
        assert (count("hit"), count("miss")) == (2, 2)


def test_names_units_and_types_are_conventional() -> None:
    with observed(open_gate(ToyTeacher())) as (client, _, app):
        client.post(PREDICT, content=pack_images(views(1)), headers=TENSORS)
        found = families(app)
        assert {name for name in found if not name.startswith("process_")} >= {
            "teacher_serve_requests",
            "teacher_serve_request_duration_seconds",
            "teacher_serve_build_info",
            "teacher_serve_teacher_info",
        }
        for name, family in found.items():
            assert re.fullmatch(r"(teacher_serve|process)_[a-z_]+", name)
            assert family.documentation
            assert "  " not in family.documentation
            samples = {sample.name for sample in family.samples}
            if family.type == "counter":
                assert samples <= {f"{name}_total", f"{name}_created"}
            elif family.type == "histogram":
                assert name.endswith(("_seconds", "_rows"))
                assert samples <= {f"{name}{end}" for end in ("_bucket", "_sum", "_count", "_created")}
            else:
                assert family.type == "gauge", name
                assert not name.endswith(("_total", "_count", "_sum", "_bucket"))
            for unit in ("milli", "_ms", "minutes", "kilo", "mega", "percent"):
                assert unit not in name
        text, media_type = app.state.metrics.text("application/openmetrics-text; version=1.0.0")
        assert media_type.startswith("application/openmetrics-text")
        # The strict parser: it refuses a counter without _total and a unit that is not the end of a name.
        assert len(list(parse_openmetrics(text.decode()))) == len(list(app.state.metrics.registry.collect()))


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["GET", "POST", "BREW", "DELETE", "x" * 40]),
            st.text("abcdefghij/%{}~.-_", max_size=20),
            st.text("abcdefghij0123", max_size=20),
        ),
        min_size=5,
        max_size=5,
    )
)
@settings(max_examples=10)
def test_strangers_add_no_labels(asked: list[tuple[str, str, str]]) -> None:
    with observed(open_gate(ToyTeacher())) as (client, _, app):
        for method, path, query in asked:
            client.request(method, f"/{path}?{query}", headers={"X-Request-Id": query or "none"})
            client.request(method, f"/v1/teachers/t{path.replace('/', '')}", headers={"User-Agent": query})
        allowed = {
            "route": {"(none)", *PATHS, *app.openapi()["paths"]},
            "method": {"GET", "POST", "DELETE", "other"},
            "teacher": {"", "toy"},
        }
        samples = [sample for family in families(app).values() for sample in family.samples]
        for label, values in allowed.items():
            assert {sample.labels[label] for sample in samples if label in sample.labels} <= values


def test_each_app_counts_for_itself() -> None:
    teacher = open_gate(ToyTeacher())
    with observed(teacher) as (client, one, _), observed(teacher) as (_, other, _):
        client.get("/nowhere")
        asked = {"route": "(none)", "method": "GET", "status": "404", "teacher": ""}
        wait_until(lambda: one("requests_total", **asked) == 1)
        assert other("requests_total", **asked) == 0


# ---------------------------------------------------------------- where the time went


def test_every_answer_says_where_its_time_went() -> None:
    teacher = open_gate(ToyTeacher())
    with observed(teacher, api_key="some-key") as (client, _, _):
        key = {"Authorization": "Bearer some-key"}
        assert list(parts(client.get("/livez"))) == ["total"]
        assert list(parts(client.get("/v1/teachers"))) == ["record", "total"]
        tensors = client.post(PREDICT, content=pack_images(views(2)), headers={**TENSORS, **key})
        image = client.post(PREDICT, content=picture("PNG"), headers={"Content-Type": "image/png", **key})
        for answer in (tensors, image):
            assert answer.status_code == 200
            found = parts(answer)
            assert list(found) == [*(part for part in PARTS if part != "cache"), "total"]
            assert sum(found.values()) <= 2 * found["total"] + 0.01


def test_waiting_is_told_from_computing() -> None:
    teacher = ToyTeacher()
    with observed(teacher) as (_, _, app):
        batcher = app.state.service.batchers["toy"]
        batcher.submit(views(1, 9), ("logits",), "someone")
        assert teacher.entered.acquire(timeout=20)
        waits = batcher.submit(views(2), ("logits",), "someone")
        time.sleep(0.05)
        teacher.gate.set()
        waits.result(20)
    assert waits.entered - waits.asked >= 0.05
    assert waits.entered < waits.left


def test_who_joins_later_has_waited_less() -> None:
    teacher = ToyTeacher()
    with observed(teacher) as (_, _, app):
        batcher = app.state.service.batchers["toy"]
        first = batcher.submit(views(1), ("logits",), "someone", identity=b"same")
        assert teacher.entered.acquire(timeout=20)
        joined = batcher.submit(views(1), ("logits",), "someone", identity=b"same")
        teacher.gate.set()
        first.result(20), joined.result(20)
    assert first.entered < joined.asked == joined.entered < joined.left


def test_questions_side_by_side_count_once() -> None:
    spent = Spent()
    spent.computing(10.0, 12.0, 15.0)
    assert spent.parts == {"queue": 2.0, "model": 3.0}
    spent.computing(10.5, 15.0, 18.0)
    spent.computing(11.0, 13.0, 14.0)
    assert spent.parts == {"queue": 2.0, "model": 6.0}


def test_parts_are_counted_together_and_in_order() -> None:
    spent = Spent()
    spent.add("model", 0.5)
    spent.add("queue", 0.25)
    spent.add("model", 1.0)
    with pytest.raises(KeyError), spent.on("body"):
        raise KeyError
    assert list(spent.parts) == ["body", "queue", "model"]
    assert spent.parts["model"] == 1.5
    assert spent.header().startswith("body;dur=0.")
    assert "queue;dur=250.000, model;dur=1500.000, total;dur=" in spent.header()
