"""`make demo`: the main job on real data, with the commands that a user would type, and what came of it.

Trains a teacher on scikit-learn's digits, caches its answers over eight seeded views, verifies the cache, trains
the same small student with and without them, serves the teacher and asks it, and writes a page and a summary to
runs/demo. Nothing is downloaded.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx

RUN = Path("runs/demo")
BIN = Path(sys.executable).parent
PATIENCE = 60.0


def main() -> None:
    """Runs every stage, times it, and shows the result."""
    os.chdir(Path(__file__).parent.parent)
    shutil.rmtree(RUN, ignore_errors=True)
    seconds: dict[str, float] = {}
    teacher = stage(seconds, "train teacher", "student-train", "fit", "examples/digits_teacher.yaml", "--json")
    stage(seconds, "plan", "teacher-cache", "plan", "examples/digits.yaml")
    built = stage(seconds, "build cache", "teacher-cache", "build", "examples/digits.yaml", "--json")
    cache = str(RUN / "cache")
    verified = stage(
        seconds, "verify", "teacher-cache", "verify", cache, "--views", "256", "--recompute", "64", "--json"
    )
    compared = stage(seconds, "compare", "student-train", "compare", "examples/digits_compare.yaml", "--json")
    report, training = str(RUN / "report.html"), str(RUN / "compare" / "result.json")
    stage(seconds, "report", "teacher-cache", "report", cache, "--html", report, "--comparison", training)
    started = time.perf_counter()
    served = ask_endpoint()
    seconds["serve and ask"] = time.perf_counter() - started
    write_result(teacher, built, verified, compared, served, seconds)


def stage(seconds: dict[str, float], name: str, program: str, *arguments: str) -> Any:
    """Runs one command as a user would, times it, and returns its JSON where it was asked for."""
    print(f"\n$ {program} {' '.join(arguments)}", flush=True)
    started = time.perf_counter()
    as_json = "--json" in arguments
    done = subprocess.run([BIN / program, *arguments], stdout=subprocess.PIPE if as_json else None, text=True)
    seconds[name] = time.perf_counter() - started
    if done.returncode:
        print(done.stdout or "", file=sys.stderr)
        sys.exit(f"the demo stopped: {program} {arguments[0]} ended with exit code {done.returncode}")
    return json.loads(done.stdout) if as_json else None


def ask_endpoint() -> bool:
    """Starts the service, asks it for cached views, stops it; True when the answers equal the cache's bits."""
    import torch

    import teacher_cache as tc
    from services.client import TeacherClient

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(BIN / "teacher-serve"), "examples/digits.yaml", "--port", str(port), "--log-level", "warning"]
    print(f"\n$ teacher-serve {' '.join(command[1:])}", flush=True)
    server = subprocess.Popen(command)
    try:
        wait_until_ready(f"http://127.0.0.1:{port}/readyz", server)
        cache = tc.open(RUN / "cache")
        rows = list(range(100))
        with TeacherClient(f"http://127.0.0.1:{port}/wide_cnn") as client:
            # By the model itself, which the cache would otherwise stand in for.
            answer = client.predict(cache.render(view=3, rows=rows), cache="bypass")
            named = client.predict_named([cache.samples.key(row) for row in rows], views=3)
        assert answer.values is not None, "logits were asked for"
        cached = cache.read("logits", view=3, rows=rows).dense().values
        same = torch.equal(answer.values.to(cached.dtype), cached)
        top = int(answer.values[0].argmax())
        print(f"asked for {len(rows)} views; the first is a {top}; equal to the cache, bit for bit: {same}")
        print(f"asked by name, without an image: {', '.join({status.shown for status in named.status})}")
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(PATIENCE)
    return same


def wait_until_ready(url: str, server: subprocess.Popen[bytes]) -> None:
    """Polls until the teacher is warm."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and server.poll() is None:
        try:
            if httpx.get(url).status_code == 200:
                return
        except httpx.TransportError:
            pass  # It does not listen yet.
        time.sleep(0.1)
    sys.exit("the demo stopped: the service did not become ready")


def write_result(
    teacher: Any, built: Any, verified: Any, compared: Any, served: bool, seconds: dict[str, float]
) -> None:
    """runs/demo/result.json for machines, a table for people."""
    from teacher_cache.console import out, print_rows

    arms = compared["arms"]
    difference = compared["differences"][0]
    result = {
        "rows": built["rows"],
        "views": built["views"],
        "verify_ok": verified["ok"],
        "teacher_accuracy": teacher["accuracy"],
        "ce_accuracy": {"mean": arms["ce"]["mean"], "std": arms["ce"]["std"]},
        "kd_accuracy": {"mean": arms["kd"]["mean"], "std": arms["kd"]["std"]},
        "kd_minus_ce": difference,
        "seeds": compared["seeds"],
        "served_equals_cached": served,
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
    }
    (RUN / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    accuracy = {arm: f"{arms[arm]['mean']:.2%} ± {arms[arm]['std']:.2%}" for arm in ("ce", "kd")}
    interval = f"{difference['low']:+.2%} … {difference['high']:+.2%}"
    rows = [
        ("rows × views in the cache", f"{built['rows']} × {built['views']}"),
        ("cache sound (bytes, 256 views, 64 rows recomputed)", verified["ok"]),
        ("teacher, on the test split", f"{teacher['accuracy']:.2%}"),
        (f"student, labels only ({len(compared['seeds'])} seeds)", accuracy["ce"]),
        (f"student, cached soft targets ({len(compared['seeds'])} seeds)", accuracy["kd"]),
        ("difference, paired, with its 95 % interval", f"{difference['mean']:+.2%} ({interval})"),
        ("served answer equals the cached one, bit for bit", served),
        *((f"seconds: {name}", f"{value:.1f}") for name, value in seconds.items()),
        ("seconds: all", f"{sum(seconds.values()):.1f}"),
    ]
    print_rows("\nthe main job, end to end", ("what", "result"), rows)
    out.print(f"page with plots: {RUN / 'report.html'}    for machines: {RUN / 'result.json'}")
    if not (served and verified["ok"]):
        sys.exit(1)


if __name__ == "__main__":
    main()
