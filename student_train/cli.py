"""`student-train`: fit, compare, evaluate."""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from teacher_cache import console
from teacher_cache.spec import parse, read_yaml

if TYPE_CHECKING:
    from student_train.comparison import Comparison

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

    spec = parse(FitSpec, read_yaml(config, set_ or ()), str(config))
    folder = Path(spec.run)
    with console.progress_bar("fit", "epochs") as progress:
        opened = open_data(spec)

        built = 0

        def log(entry: dict[str, float]) -> None:
            nonlocal built
            built += 1
            progress(int(entry["epoch"]), spec.train.epochs, built)

        result = train_one(spec, opened, spec.objective, spec.seed, folder, log)
    last = result.history[-1]
    if json:
        console.print_json({"run": str(folder), **last})
        return
    facts = {name: f"{value:.4g}" for name, value in last.items()}
    console.print_facts("after the last epoch", {**facts, "model": folder / "model.safetensors"})


@app.command()
def compare(config: Config, set_: Set = None, json: Json = False) -> None:
    """Train every arm with paired seeds, and say whether the differences mean anything."""
    from student_train.compare import compare as run_compare
    from student_train.recipes import CompareSpec

    spec = parse(CompareSpec, read_yaml(config, set_ or ()), str(config))
    epochs = len(spec.arms) * len(spec.seeds) * spec.train.epochs
    with console.progress_bar("compare", "epochs") as progress:
        done = 0

        def count(arm: str, seed: int, entry: dict[str, float]) -> None:
            nonlocal done
            done += 1
            progress(done, epochs, done)

        comparison = run_compare(spec, count)
    if json:
        console.print_json(comparison.to_json())
        return
    _show(comparison)
    console.out.print(f"picture: {Path(spec.run) / 'result.png'}    for machines: {Path(spec.run) / 'result.json'}")


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
        verdict = "significant" if item.significant else "NOT significant"
        mean, low, high = (measure.show_difference(value) for value in (item.mean, item.low, item.high))
        what = "" if item.measure == "accuracy" else f", {measure.title}"
        console.out.print(f"{item.arm} − {item.against}{what}: {mean} (95 % interval {low} … {high}, {verdict})")
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
