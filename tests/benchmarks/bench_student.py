"""What a student pays for a teacher: a step from the cache over a plain one, teachers of several sizes, a live one.

    python tests/benchmarks/bench_student.py --data FOLDER [--json]

FOLDER holds CIFAR-10's `train.parquet` and `resnet56_cifar10.pt`. Loops that are compared run in turns, a few whole
steps at a time (data, forward, loss, backward, step), each from a stream of its own; a ratio is the median of the
rounds' ratios. One thread; two workers prepare batches where that is said.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from bench_views import Rows, photograph, ratio, show
from torch import Tensor, nn

import teacher_cache as tc
from student_train import KD, CachedRows, CrossEntropy, Objective, TrainSpec, ViewStream, fit
from student_train.batch import Batch
from student_train.data import LabelledRows
from student_train.recipes import StudentSpec
from student_train.students import open_student
from teacher_cache.manifest import library_versions
from teacher_cache.spec import BuildSpec, FolderSource, NormalizeSpec, ParquetSource, ViewSpec
from teacher_cache.teachers.weights import load_into
from teacher_cache.views import normalize

Step = Callable[[], None]
ROWS, BATCH, TURN = 2048, 128, 3
NORMALIZE = NormalizeSpec(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
RECIPE: list[dict[str, Any]] = [
    {"pad_crop": {"size": 32, "padding": 4}},
    {"horizontal_flip": {"p": 0.5}},
    {"normalize": NORMALIZE.model_dump()},
]
TEACHERS: dict[str, dict[str, Any]] = {
    "small_cnn": {"model": "student_train.students:small_cnn", "arguments": {"width": 16}},
    "ResNet-56": {"model": "student_train.students:resnet56_cifar"},
    "ResNet-50": {"model": "torchvision:resnet50", "arguments": {"num_classes": 10}},
}
"""5 thousand, 0.86 million and 24 million parameters."""
STUDENTS = {
    "ResNet-20": StudentSpec(model="resnet20_cifar"),
    "small ViT": StudentSpec(
        model="timm:vit_tiny_patch16_224", arguments={"img_size": 32, "patch_size": 4, "depth": 4}
    ),
}


def opened(spec: StudentSpec) -> nn.Module:
    return open_student(spec, 10, 3, seed=0).train()


def cached(root: Path, name: str, source: dict[str, Any], recipe: list[Any], teacher: dict[str, Any]) -> tc.Cache:
    """A cache of four views, of this teacher."""
    described = {
        "cache": str(root / name),
        "source": source,
        "views": {"recipe": recipe, "count": 4},
        "teacher": {**teacher, "micro_batch": 64},
        "compute": {"device": "cpu"},
    }
    tc.build(BuildSpec.model_validate(described), executor="serial")
    return tc.open(root / name)


def endless(stream: ViewStream) -> Iterator[Batch]:
    while True:
        yield from stream


def stepper(student: nn.Module, stream: ViewStream, loss_of: Callable[[Tensor, Batch, Tensor], Tensor]) -> Step:
    """One whole step at each call."""
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9)
    batches = endless(stream)

    def step() -> None:
        batch = next(batches)
        inputs = normalize(batch.views_BCHW, NORMALIZE)
        loss = loss_of(student(inputs), batch, inputs)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def plain(student: nn.Module, rows: LabelledRows) -> Step:
    objective = Objective([CrossEntropy()])
    return stepper(student, ViewStream(rows, batch_size=BATCH, fields=()), lambda z, batch, _: objective(z, batch)[0])


def from_cache(student: nn.Module, cache: tc.Cache) -> Step:
    objective = Objective([KD(0.9), CrossEntropy(0.1)])
    return stepper(student, ViewStream(cache, batch_size=BATCH), lambda z, batch, _: objective(z, batch)[0])


def live(student: nn.Module, rows: LabelledRows, teacher: nn.Module) -> Step:
    def loss_of(logits_BC: Tensor, batch: Batch, inputs_BCHW: Tensor) -> Tensor:
        with torch.no_grad():
            target = (teacher(inputs_BCHW) / 4).log_softmax(1)
        soft = nn.functional.kl_div((logits_BC / 4).log_softmax(1), target, reduction="batchmean", log_target=True)
        return 16 * 0.9 * soft + 0.1 * nn.functional.cross_entropy(logits_BC, batch.labels_B)

    return stepper(student, ViewStream(rows, batch_size=BATCH, fields=()), loss_of)


def turns(rounds: int, *works: Step, at_once: int = TURN) -> list[list[float]]:
    """Seconds of a step of each, by round; the order changes from round to round."""
    for work in works:
        work()
    seconds: list[list[float]] = [[] for _ in works]
    for number in range(rounds):
        places = range(len(works))
        for place in places if number % 2 else reversed(places):
            started = time.perf_counter()
            for _ in range(at_once):
                works[place]()
            seconds[place].append((time.perf_counter() - started) / at_once)
    return seconds


def steps(rounds: int, rows: LabelledRows, caches: dict[str, tc.Cache], teachers: dict[str, nn.Module]) -> Rows:
    found: Rows = {}
    cache = caches["ResNet-56"]
    for name, spec in STUDENTS.items():
        bare, kd = turns(rounds, plain(opened(spec), rows), from_cache(opened(spec), cache))
        found[f"{name}: step with KD from cache / plain CE step"] = f"{ratio(kd, bare):.3f}  ({_ms(kd)} / {_ms(bare)})"
    spec = STUDENTS["ResNet-20"]
    by_teacher = turns(rounds, *(from_cache(opened(spec), cache) for cache in caches.values()))
    for name, times in zip(caches, by_teacher, strict=True):
        found[f"ResNet-20 from the cache of {name} / of small_cnn"] = f"{ratio(times, by_teacher[0]):.3f}"
    works = [plain(opened(spec), rows), *(live(opened(spec), rows, teachers[name]) for name in caches)]
    bare, *asked = turns(max(3, rounds // 4), *works, at_once=1)
    for name, times in zip(caches, asked, strict=True):
        found[f"ResNet-20 with a live {name} / plain CE step"] = f"{ratio(times, bare):.2f}"
    return found


def _ms(seconds: list[float]) -> str:
    return f"{statistics.median(seconds) * 1e3:.0f} ms"


def shares(cache: tc.Cache, epochs: int = 2) -> Rows:
    """Where a real run's time goes, with two workers."""
    objective = Objective([KD(0.9), CrossEntropy(0.1)])
    stream = ViewStream(cache, batch_size=BATCH, drop_last=True, workers=2)
    history = fit(
        opened(STUDENTS["ResNet-20"]),
        stream,
        objective,
        TrainSpec(epochs=epochs + 1, batch_size=BATCH, lr=0.01, device="cpu"),
        normalization=NORMALIZE,
    ).history[1:]
    total = {name: sum(entry[name] for entry in history) for name in history[0] if name.endswith("seconds")}
    said = {name: f"{value / total['seconds']:.2%}" for name, value in total.items() if name != "seconds"}
    return {
        "ResNet-20, two workers: waiting for data": said["data_seconds"],
        "the same: read and decode targets (in the workers)": said["target_seconds"],
        "the same: decode images / render and prove views (in the workers)": f"{said['decode_seconds']} / "
        f"{said['view_seconds']}",
    }


def epochs(rounds: int, root: Path, size: int = 64, count: int = 128) -> Rows:
    """Four views of one decoding against one, as many views of JPEG photographs each."""
    for number in range(count):
        folder = root / "photographs" / str(number % 10)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.jpg").write_bytes(photograph(number))
    recipe: list[Any] = [{"random_resized_crop": {"size": size}}, {"normalize": NORMALIZE.model_dump()}]
    source = {"kind": "folder", "path": str(root / "photographs"), "channels": 3}
    cache = cached(root, "photographs-cache", source, recipe, TEACHERS["small_cnn"])
    student = StudentSpec(model="small_cnn", arguments={"width": 16})
    labelled = LabelledRows(FolderSource.model_validate(source), ViewSpec.model_validate({"recipe": recipe}))
    objective = Objective([KD(0.9), CrossEntropy(0.1)])

    def cost(of: LabelledRows | CachedRows, fields: tuple[str, ...], together: int, goal: Objective) -> Step:
        stream = ViewStream(of, batch_size=64, fields=fields, views_per_decode=together)
        return stepper(opened(student), stream, lambda z, batch, _: goal(z, batch)[0])

    works = (
        cost(labelled, (), 1, Objective([CrossEntropy()])),
        cost(CachedRows(cache), ("logits",), 1, objective),
        cost(CachedRows(cache), ("logits",), 4, objective),
    )
    bare, one, four = turns(rounds, *works, at_once=2)
    return {
        f"JPEG 500×375 to {size}×{size}, small_cnn: KD epoch, 4 views of each decoding / plain CE epoch": (
            f"{ratio(four, bare):.2f}"
        ),
        "the same, one view of each decoding / plain CE epoch": f"{ratio(one, bare):.2f}",
    }


def main() -> None:
    """Builds what is needed in a temporary folder, measures, prints a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    found: Rows = {"machine": platform.processor() or platform.machine(), **library_versions(), "threads": "1"}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        pq.write_table(pq.read_table(asked.data / "train.parquet")[:ROWS], root / "rows.parquet")
        source = {"kind": "parquet", "path": [str(root / "rows.parquet")]}
        TEACHERS["ResNet-56"]["weights"] = str(asked.data / "resnet56_cifar10.pt")
        caches = {name: cached(root, name, source, RECIPE, teacher) for name, teacher in TEACHERS.items()}
        teachers = {
            "small_cnn": opened(StudentSpec(model="small_cnn")).eval(),
            "ResNet-56": opened(StudentSpec(model="resnet56_cifar")).eval(),
            "ResNet-50": opened(StudentSpec(model="torchvision:resnet50")).eval(),
        }
        load_into(teachers["ResNet-56"], TEACHERS["ResNet-56"]["weights"])
        rows = LabelledRows(ParquetSource.model_validate(source), ViewSpec.model_validate({"recipe": RECIPE}))
        found |= steps(asked.rounds, rows, caches, teachers)
        found |= shares(caches["ResNet-56"])
        found |= epochs(asked.rounds, root)
    show(found, asked.json)


if __name__ == "__main__":
    main()
