"""`student-train`: fit, compare, evaluate."""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from teacher_cache import console
from teacher_cache.spec import parse, read_yaml

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
    from student_train.recipes import FitSpec
    from student_train.run import open_data, train_one

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
    rows = []
    for arm, values in comparison.accuracy.items():
        mean = f"{statistics.fmean(values):.2%} ± {statistics.stdev(values):.2%}"
        rows.append((arm, mean, f"{min(values):.2%} … {max(values):.2%}"))
    title = f"accuracy after the last epoch, {len(spec.seeds)} seeds"
    console.print_rows(title, ("arm", "mean ± std", "lowest … highest"), rows)
    for item in comparison.differences:
        verdict = "significant" if item.significant else "NOT significant"
        interval = f"95 % interval {item.low:+.2%} … {item.high:+.2%}"
        console.out.print(f"{item.arm} − {item.against}: {item.mean:+.2%} ({interval}, {verdict})")


@app.command()
def evaluate(
    config: Config,
    weights: Annotated[Path, typer.Option(help="model.safetensors of a finished run.")],
    set_: Set = None,
    json: Json = False,
) -> None:
    """Measure a finished student on the configuration's evaluation data."""
    from student_train.recipes import FitSpec
    from student_train.run import evaluate_weights

    spec = parse(FitSpec, read_yaml(config, set_ or ()), str(config))
    found = evaluate_weights(spec, weights)
    if json:
        console.print_json({"weights": str(weights), "accuracy": found})
    else:
        console.print_facts("evaluation", {"weights": weights, "accuracy": f"{found:.2%}"})


if __name__ == "__main__":
    sys.exit(main())
