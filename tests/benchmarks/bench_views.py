"""Views on one core: drawing, rendering, several views of one decoding, the digest and the student's check.

    python tests/benchmarks/bench_views.py [--json]

Whatever is compared is timed in turns within one run, so that a machine that slows down slows both sides; a figure is
the median over the rounds, a ratio the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import io
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

import teacher_cache as tc
from student_train import KD, CrossEntropy, Objective, ViewStream
from student_train.students import small_cnn
from teacher_cache.fingerprint import key_digests
from teacher_cache.loader import ViewLoader
from teacher_cache.manifest import library_versions
from teacher_cache.sources import Item
from teacher_cache.sources.base import decode_image
from teacher_cache.spec import BuildSpec, ViewSpec
from teacher_cache.views import How, Recipe, normalize, open_recipe, render_views
from teacher_cache.views.digest import pixel_digests

Rows = dict[str, str]
BATCH = 256
TURN = 0.02
"""Seconds that a turn lasts at least."""
CIFAR: list[Any] = [{"pad_crop": {"size": 32}}, "horizontal_flip"]
IMAGENET: list[Any] = [{"random_resized_crop": {"size": 224}}, "horizontal_flip"]


def in_turns(rounds: int, *works: Callable[[], object]) -> list[list[float]]:
    """Seconds of each work in each round; the order changes from round to round, short works are repeated."""
    repeats = []
    for work in works:
        work()
        started = time.perf_counter()
        work()
        repeats.append(max(1, round(TURN / (time.perf_counter() - started))))
    seconds: list[list[float]] = [[] for _ in works]
    for number in range(rounds):
        order = range(len(works)) if number % 2 else reversed(range(len(works)))
        for place in order:
            started = time.perf_counter()
            for _ in range(repeats[place]):
                works[place]()
            seconds[place].append((time.perf_counter() - started) / repeats[place])
    return seconds


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def recipe_of(steps: list[Any]) -> Recipe:
    return open_recipe(ViewSpec.model_validate({"recipe": steps, "seed": 7, "count": 50}))


def noise(count: int, height: int, width: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return list(torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator))


def photograph(seed: int) -> bytes:
    """A JPEG of 500×375 with the detail of a photograph: smoothed noise at several scales."""
    generator = np.random.Generator(np.random.Philox(seed))
    layers = [generator.integers(0, 256, (375 // size + 1, 500 // size + 1, 3), np.uint8) for size in (3, 20, 90)]
    scaled = [
        np.asarray(Image.fromarray(layer).resize((500, 375), Image.Resampling.BICUBIC), float) for layer in layers
    ]
    file = io.BytesIO()
    Image.fromarray(np.mean(scaled, axis=0).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def parameters(rounds: int) -> Rows:
    """Drawing for a batch: cheap, usual and heavy recipes."""
    digests, sizes = key_digests([str(number) for number in range(BATCH)]), np.tile([375, 500], (BATCH, 1))
    heavy = [*IMAGENET, "rand_augment", {"random_erasing": {"p": 0.25}}]
    recipes = {"crop + flip": CIFAR, "random_resized_crop + flip": IMAGENET, "the same + rand_augment + erasing": heavy}
    works = [partial(recipe_of(steps).draw, digests, sizes, 3) for steps in recipes.values()]
    found = {}
    for name, seconds in zip(recipes, in_turns(rounds, *works), strict=True):
        each = statistics.median(seconds) / BATCH * 1e6
        found[f"parameters of {name}, µs a sample (batch of 256)"] = f"{each:.2f}"
    return found


def cifar(rounds: int) -> Rows:
    """Crop and flip at 32×32, from decoded images to a batch: ours batched, ours one by one, torchvision seeded."""
    recipe, images = recipe_of(CIFAR), noise(BATCH, 32, 32)
    digests = key_digests([str(number) for number in range(BATCH)])
    pipeline = v2.Compose([v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()])

    def cheaply() -> None:
        for seed, image in enumerate(images):
            saved = torch.default_generator.get_state()
            torch.default_generator.manual_seed(seed)
            pipeline(image)
            torch.default_generator.set_state(saved)

    def forked() -> None:
        for seed, image in enumerate(images):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                pipeline(image)

    def ours(how: How) -> Callable[[], object]:
        return lambda: render_views(recipe, images, digests, 3, how=how)

    batch, single, seeded, fork = in_turns(rounds, ours(How()), ours(How(batched=False)), cheaply, forked)
    each = {
        "batched": batch,
        "image by image": single,
        "torchvision v2, cheap seeding": seeded,
        "torchvision v2, fork_rng": fork,
    }
    figures = {
        f"crop + flip 32×32, µs an image: {name}": f"{statistics.median(v) / BATCH * 1e6:.1f}"
        for name, v in each.items()
    }
    return {**figures, "torchvision (cheap) ÷ batched": f"{ratio(seeded, batch):.1f}"}


def imagenet(rounds: int, count: int = 64) -> Rows:
    """Random resized crop to 224 and flip from decoded images, against the bare functional calls and a stack."""
    recipe, images = recipe_of(IMAGENET), noise(count, 375, 500)
    digests = key_digests([str(number) for number in range(count)])
    params = recipe.draw(digests, np.tile([375, 500], (count, 1)), 1).params_BP.tolist()

    def bare() -> Tensor:
        views = []
        for image, (top, left, height, width, flip) in zip(images, params, strict=True):
            view = tv.resized_crop(image, top, left, height, width, [224, 224], antialias=True)
            views.append(tv.horizontal_flip(view) if flip else view)
        return torch.stack(views)

    ours, theirs = in_turns(rounds, lambda: render_views(recipe, images, digests, 1), bare)
    return {
        "random_resized_crop 224 + flip, µs an image": f"{statistics.median(ours) / count * 1e6:.0f}",
        "the same ÷ torchvision's functional calls": f"{ratio(ours, theirs):.3f}",
    }


def rendering(steps: list[Any], images: list[Tensor]) -> Callable[[], Tensor]:
    """Draws and renders one view of each image."""
    recipe, digests = recipe_of(steps), key_digests([str(number) for number in range(len(images))])
    return lambda: render_views(recipe, images, digests, 1).pixels_BCHW


def integer_kernel(rounds: int) -> Rows:
    """The kernel that gives the same pixels on any machine, against torchvision's, both through the engine."""
    found = {}
    for size, edge, count in ((32, 32, BATCH), (224, 256, 16)):
        images = noise(count, edge, edge)
        kernels = [[{"random_resized_crop": {"size": size, "kernel": kind}}] for kind in ("integer", "torchvision")]
        ours, theirs = in_turns(rounds, *(rendering(steps, images) for steps in kernels))
        found[f"random_resized_crop {edge} → {size}: integer kernel ÷ torchvision's"] = f"{ratio(ours, theirs):.2f}"
    return found


def one_decoding(rounds: int, count: int = 16, views: int = 4) -> Rows:
    """JPEG to four views: decoded once, or once for each view."""
    files = [photograph(seed) for seed in range(count)]
    digests = key_digests([str(number) for number in range(count)])

    def item(row: int) -> Item:
        return decode_image(files[row])

    loader, rows = ViewLoader(recipe_of(IMAGENET), digests, item), list(range(count))

    def once() -> None:
        decoded = loader.decode(rows)
        for view in range(views):
            loader.views(decoded, view)

    def each() -> None:
        for view in range(views):
            loader.views(loader.decode(rows), view)

    ours, theirs, decode = in_turns(rounds, once, each, lambda: loader.decode(rows))
    return {
        "JPEG 500×375, decoding, ms an image": f"{statistics.median(decode) / count * 1e3:.2f}",
        "(decode + 4 views) ÷ 4 × (decode + 1 view)": f"{ratio(ours, theirs):.2f}",
    }


def digest(rounds: int) -> Rows:
    """The digest of a batch of views, and its share of the time that rendering them takes."""
    found = {}
    for name, steps, count, shape in (("32×32", CIFAR, BATCH, (32, 32)), ("224×224", IMAGENET, 64, (375, 500))):
        render = rendering(steps, noise(count, *shape))
        views = render()
        hashing, rendered = in_turns(rounds, partial(pixel_digests, views), render)
        speed = views.numel() / statistics.median(hashing) / 1e9
        found[f"digest of {count} views of {name}, GB/s"] = f"{speed:.1f}"
        found[f"digest ÷ rendering, {name}"] = f"{ratio(hashing, rendered):.3f}"
    return found


def check(rounds: int, rows: int = 1024) -> Rows:
    """What the student's check of two views of every batch adds to a training step (small_cnn, 32×32, 128 rows)."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        np.save(root / "images.npy", torch.stack(noise(rows, 32, 32)).permute(0, 2, 3, 1).numpy())
        np.save(root / "labels.npy", np.arange(rows) % 10)
        spec = BuildSpec.model_validate(
            {
                "cache": str(root / "cache"),
                "source": {"kind": "numpy", "images": str(root / "images.npy"), "labels": str(root / "labels.npy")},
                "views": {"recipe": CIFAR, "count": 2},
                "teacher": {
                    "model": "student_train.students:small_cnn",
                    "arguments": {"classes": 10, "channels": 3, "width": 4},
                },
                "compute": {"device": "cpu"},
            }
        )
        tc.build(spec, executor="serial")
        cache = tc.open(root / "cache")
        student = small_cnn(classes=10, channels=3, width=32)
        objective = Objective([KD(), CrossEntropy()])

        def epoch(checked: int) -> Callable[[], object]:
            stream = ViewStream(cache, batch_size=128, check_views=checked)

            def run() -> None:
                for batch in stream:
                    loss, _ = objective(student(normalize(batch.views_BCHW, None)), batch)
                    student.zero_grad()
                    loss.backward()  # type: ignore[no-untyped-call]

            return run

        def data(checked: int) -> Callable[[], object]:
            stream = ViewStream(cache, batch_size=128, check_views=checked)
            return lambda: [None for _ in stream]

        whole, _, checked, unchecked = in_turns(rounds, epoch(2), epoch(0), data(2), data(0))
    steps = rows // 128
    # The difference of two epochs would drown in the noise of the training step: the data side alone is steadier.
    added = statistics.median(a - b for a, b in zip(checked, unchecked, strict=True)) / steps
    step = statistics.median(whole) / steps
    return {
        "check of 2 views of a batch of 128, µs a step": f"{added * 1e6:.0f}",
        "the same, share of a student's step": f"{added / step:.2%} of {step * 1e3:.0f} ms",
    }


def run(parts: Iterable[Callable[[int], Rows]], described: str | None) -> None:
    """The command of a benchmark: every part on one thread, then a table, or one JSON document."""
    parser = argparse.ArgumentParser(description=described, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=15)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    found: Rows = {"machine": platform.processor() or platform.machine(), **library_versions(), "threads": "1"}
    for part in parts:
        found |= part(asked.rounds)
    show(found, asked.json)


def show(found: Rows, as_json: bool) -> None:
    """A table, or one JSON document."""
    if as_json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
        return
    width = max(map(len, found))
    for name, value in found.items():
        print(f"{name:<{width}}  {value}")


if __name__ == "__main__":
    run((parameters, cifar, imagenet, integer_kernel, one_decoding, digest, check), __doc__)
