"""`student-train`: fit, compare, evaluate."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from teacher_cache import console
from teacher_cache.spec import parse, read_yaml

if TYPE_CHECKING:
    from student_train.comparison import Comparison
    from student_train.together import World

app = typer.Typer(
    help="Train small students from cached soft targets, with no teacher in memory.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

Config = Annotated[Path, typer.Argument(help="A run's YAML file.", metavar="CONFIG")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Replace a value: train.epochs=5", metavar="KEY=VALUE")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")]


def main() -> NoReturn:
    """Entry point of the console script."""
    console.sys_path_here()
    console.run(app, "Finished epochs are kept; the same command goes on after the last one.")


@app.command()
def fit(config: Config, set_: Set = None, json: Json = False) -> None:
    """Train one student; a run that was stopped goes on."""
    from student_train.opening import open_data
    from student_train.recipes import FitSpec
    from student_train.run import train_one
    from student_train.together import joining

    spec = parse(FitSpec, read_yaml(config, set_ or ()), str(config))
    folder = Path(spec.run)
    with joining(spec.train.device) as together, _progress(together, "fit") as progress:
        opened = open_data(spec)

        built = 0

        def log(entry: dict[str, float]) -> None:
            nonlocal built
            built += 1
            progress(int(entry["epoch"]), spec.train.epochs, built)

        result = train_one(spec, opened, spec.objective, spec.seed, folder, log)
    if not together.first:
        return
    last = result.history[-1]
    if json:
        console.print_json({"run": str(folder), **last})
        return
    facts = {name: f"{value:.4g}" for name, value in last.items() if not name.endswith("seconds")}
    facts = {**facts, "time of the epoch": _time(last), "model": str(folder / "model.safetensors")}
    console.print_facts("after the last epoch", facts)


@app.command()
def compare(config: Config, set_: Set = None, json: Json = False) -> None:
    """Train every arm with paired seeds, and say whether the differences mean anything."""
    from student_train.compare import compare as run_compare
    from student_train.recipes import CompareSpec
    from student_train.together import joining

    spec = parse(CompareSpec, read_yaml(config, set_ or ()), str(config))
    epochs = len(spec.arms) * len(spec.seeds) * spec.train.epochs
    with joining(spec.train.device) as together, _progress(together, "compare") as progress:
        done = 0

        def count(arm: str, seed: int, entry: dict[str, float]) -> None:
            nonlocal done
            done += 1
            progress(done, epochs, done)

        comparison = run_compare(spec, count)
    if not together.first:
        return
    if json:
        console.print_json(comparison.to_json())
        return
    _show(comparison)
    console.out.print(f"picture: {Path(spec.run) / 'result.png'}    for machines: {Path(spec.run) / 'result.json'}")


def _time(entry: dict[str, float]) -> str:
    """Where an epoch's seconds went, for people."""
    seconds = entry["seconds"]
    split = f"{entry['data_seconds'] / seconds:.1%} waiting for batches, {entry['step_seconds'] / seconds:.1%} steps"
    if "decode_seconds" not in entry:
        # An epoch that an earlier release trained.
        return f"{seconds:.1f} s: {split}"
    made = ", ".join(f"{name} {entry[f'{name}_seconds']:.2f} s" for name in ("decode", "view", "target"))
    return f"{seconds:.1f} s: {split}; making the batches: {made}"


def _progress(together: World, title: str) -> AbstractContextManager[Callable[[int, int, int], None]]:
    """One bar for all processes."""
    return console.progress_bar(title, "epochs") if together.first else nullcontext(lambda *_: None)


def _show(comparison: Comparison) -> None:
    from student_train.evaluate import MEASURES

    rows = []
    for arm in comparison.history:
        columns = [(MEASURES[name].show, comparison.values(name, arm)) for name in comparison.measures]
        rows.append((arm, *(f"{show(fmean(values))} ± {show(stdev(values))}" for show, values in columns)))
    title = f"after the last epoch, {len(comparison.spec.seeds)} seeds: mean ± standard deviation"
    console.print_rows(title, ("arm", *(MEASURES[name].title for name in comparison.measures)), rows)
    for item in comparison.differences:
        measure = MEASURES[item.measure]
        verdict = "significant" if item.significant else "NOT significant" if item.spread else "the same in every pair"
        mean, low, high = (measure.show_difference(value) for value in (item.mean, item.low, item.high))
        what = "" if item.measure == "accuracy" else f", {measure.title}"
        console.out.print(f"{item.arm} − {item.against}{what}: {mean} (95 % interval {low} … {high}, {verdict})")
    if len(comparison.differences) > 1:
        console.out.print(f"{len(comparison.differences)} comparisons; each interval is that of one, not corrected.")
    if comparison.chosen is not None:
        console.out.print(f"best on the held-out rows, by which to choose: {comparison.chosen}")


@app.command()
def evaluate(
    config: Config,
    weights: Annotated[Path, typer.Option(help="model.safetensors of a finished run.")],
    set_: Set = None,
    json: Json = False,
) -> None:
    """Measure a finished student on the configuration's evaluation data."""
    from student_train.evaluate import MEASURES
    from student_train.recipes import FitSpec
    from student_train.run import evaluate_weights

    spec = parse(FitSpec, read_yaml(config, set_ or ()), str(config))
    found = evaluate_weights(spec, weights)
    if json:
        console.print_json({"weights": str(weights), **found.named()})
        return
    shown = {name: MEASURES[name].show(value) for name, value in found.named().items()}
    console.print_facts("evaluation", {"weights": weights, **shown})


if __name__ == "__main__":
    sys.exit(main())
