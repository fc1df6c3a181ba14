"""`teacher-serve predict IMAGE… --url URL`: asks a running service, for people and for scripts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from services.client import TeacherClient
from services.picture_files import grouped, read_picture
from services.prediction import Prediction
from services.schemas import TeacherCard
from services.status import Status
from teacher_cache import console
from teacher_cache.errors import TeacherError

Shown = Literal["logits", "logprobs", "probs", "topk"]
_MOST_SHOWN = 5
"""Classes of one image in the table; --json has all that was asked for."""
Item = tuple[Prediction, int]
"""An answer to several pictures, and which of them is meant."""


def predict(
    images: Annotated[list[Path], typer.Argument(help="JPEG, PNG or WebP.", metavar="IMAGE…", show_default=False)],
    url: Annotated[str, typer.Option(help="http(s)://host:port/<teacher>, as teacher-serve prints it.")],
    output: Annotated[Shown, typer.Option(help="What is made of the logits.")] = "topk",
    k: Annotated[int | None, typer.Option(min=1, help="Classes of a topk; the service's default if absent.")] = None,
    temperature: Annotated[float | None, typer.Option(help="T of the softmax; not for logits.")] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")] = False,
) -> None:
    """Ask a running service about some pictures. The key is read from TEACHER_API_KEY."""
    for path in images:
        # Before the first of them is asked about, and perhaps paid for.
        read_picture(path)
    with TeacherClient(url) as client:
        card = client.card()
        asked = grouped(images, card.limits)
        groups = [
            client.predict_files(paths, output=output, k=k, temperature=temperature, strict=False) for paths in asked
        ]
    answers = [(group, item) for group in groups for item in range(len(group.status))]
    for path, (group, item) in zip(images, answers, strict=True):
        _require_answer(path, group.status[item])
    if json:
        rows = [_as_json(path, answer, card) for path, answer in zip(images, answers, strict=True)]
        console.print_json({"teacher": card.name, "digest": card.digest, "output": output, "answers": rows})
        return
    header = ("image", "class", output if output != "topk" else "log-probability")
    lines = [line for path, answer in zip(images, answers, strict=True) for line in _lines(path, answer, card)]
    console.print_rows(f"{card.name} at {url}", header, lines)
    if any(group.metadata.get("resized") == "true" for group in groups):
        height, width, _ = card.input.shape
        console.out.print(f"Pictures of another size were resized and cropped to {width}×{height} by the service.")


def _require_answer(path: Path, status: Status) -> None:
    if not status.answered:
        raise TeacherError("path", "must be a picture that the service can answer", path, f"It is {status.shown}.")


def _ranked(answer: Item) -> list[tuple[int, float]]:
    """Classes of one image and their values, the largest first; equal ones in the order of their classes."""
    group, item = answer
    assert group.values is not None, "logits were asked for"
    values = group.values[item].tolist()
    classes = range(len(values)) if group.indices is None else group.indices[item].tolist()
    return sorted(zip(classes, values, strict=True), key=lambda pair: (-pair[1], pair[0]))


def _name(card: TeacherCard, index: int) -> str:
    return str(index) if card.class_names is None else card.class_names[index]


def _lines(path: Path, answer: Item, card: TeacherCard) -> list[tuple[str, str, str]]:
    ranked = _ranked(answer)
    most = len(ranked) if answer[0].indices is not None else _MOST_SHOWN
    return [
        (str(path) if place == 0 else "", _name(card, index), f"{value:.4f}")
        for place, (index, value) in enumerate(ranked[:most])
    ]


def _as_json(path: Path, answer: Item, card: TeacherCard) -> dict[str, object]:
    group, item = answer
    assert group.values is not None, "logits were asked for"
    assert group.resized is not None, "files were sent"
    found: dict[str, object] = {"image": str(path), "values": group.values[item].tolist()}
    if group.indices is not None and group.tail_logmass is not None:
        indices = group.indices[item].tolist()
        found |= {"indices": indices, "tail_logmass": group.tail_logmass[item].item()}
        if card.class_names is not None:
            found["names"] = [card.class_names[index] for index in indices]
    return found | {"resized": group.resized[item]}
