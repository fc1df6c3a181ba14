"""`teacher-serve predict IMAGE… --url URL`: asks a running service, for people and for scripts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from services.client import TeacherClient
from services.prediction import Prediction, Wish, ask_file
from services.schemas import Output, TeacherCard
from teacher_cache import console

_MOST_SHOWN = 5
"""Classes of one image in the table; --json has all that was asked for."""


def predict(
    images: Annotated[list[Path], typer.Argument(help="JPEG, PNG or WebP.", metavar="IMAGE…", show_default=False)],
    url: Annotated[str, typer.Option(help="http(s)://host:port/<teacher>, as teacher-serve prints it.")],
    output: Annotated[Output, typer.Option(help="What is made of the logits.")] = "topk",
    k: Annotated[int | None, typer.Option(min=1, help="Classes of a topk; the service's default if absent.")] = None,
    temperature: Annotated[float | None, typer.Option(help="T of the softmax; not for logits.")] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")] = False,
) -> None:
    """Ask a running service about some pictures. The key is read from TEACHER_API_KEY."""
    for path in images:
        # Before the first of them is asked about, and perhaps paid for.
        ask_file(path, Wish())
    with TeacherClient(url) as client:
        card = client.card()
        answers = [client.predict_file(path, output=output, k=k, temperature=temperature) for path in images]
    if json:
        rows = [_as_json(path, answer, card) for path, answer in zip(images, answers, strict=True)]
        console.print_json({"teacher": card.name, "digest": card.digest, "output": output, "answers": rows})
        return
    header = ("image", "class", output if output != "topk" else "log-probability")
    lines = [line for path, answer in zip(images, answers, strict=True) for line in _lines(path, answer, card)]
    console.print_rows(f"{card.name} at {url}", header, lines)
    if any(answer.metadata.get("resized") == "true" for answer in answers):
        height, width, _ = card.input.shape
        console.out.print(f"Pictures of another size were resized and cropped to {width}×{height} by the service.")


def _ranked(answer: Prediction) -> list[tuple[int, float]]:
    """Classes of one image and their values, the largest first; equal ones in the order of their classes."""
    assert answer.values is not None, "logits were asked for"
    values = answer.values[0].tolist()
    classes = range(len(values)) if answer.indices is None else answer.indices[0].tolist()
    return sorted(zip(classes, values, strict=True), key=lambda pair: (-pair[1], pair[0]))


def _name(card: TeacherCard, index: int) -> str:
    return str(index) if card.class_names is None else card.class_names[index]


def _lines(path: Path, answer: Prediction, card: TeacherCard) -> list[tuple[str, str, str]]:
    ranked = _ranked(answer)
    most = len(ranked) if answer.indices is not None else _MOST_SHOWN
    return [
        (str(path) if place == 0 else "", _name(card, index), f"{value:.4f}")
        for place, (index, value) in enumerate(ranked[:most])
    ]


def _as_json(path: Path, answer: Prediction, card: TeacherCard) -> dict[str, object]:
    assert answer.values is not None, "logits were asked for"
    found: dict[str, object] = {"image": str(path), "values": answer.values[0].tolist()}
    if answer.indices is not None and answer.tail_logmass is not None:
        indices = answer.indices[0].tolist()
        found |= {"indices": indices, "tail_logmass": answer.tail_logmass[0].item()}
        if card.class_names is not None:
            found["names"] = [card.class_names[index] for index in indices]
    return found | {"resized": answer.metadata.get("resized") == "true"}
