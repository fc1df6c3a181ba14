"""`teacher-cache`: plan, build, abandon, status, verify, repair, describe, report, export."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer

from teacher_cache import console
from teacher_cache.addition import Addition
from teacher_cache.encodings.calibration import Calibration
from teacher_cache.errors import SpecError
from teacher_cache.manifest import Manifest
from teacher_cache.problem import Problem
from teacher_cache.spec import SourceSpec, load_spec

app = typer.Typer(
    help="Run a frozen teacher once over seeded views; keep its soft targets.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

Config = Annotated[Path, typer.Argument(help="A build's YAML file.", metavar="CONFIG")]
CachePath = Annotated[str, typer.Argument(help="A cache's folder, or s3://bucket/prefix.", metavar="PATH")]
Set = Annotated[
    list[str] | None, typer.Option("--set", help="Replace a value: teacher.weights=w.pt", metavar="KEY=VALUE")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")]
SourceFrom = Annotated[
    Path | None, typer.Option("--source-from", help="A CONFIG whose `source` says where the data is now.")
]


def main() -> NoReturn:
    """Entry point of the console script."""
    console.sys_path_here()
    console.run(app, "What is committed stays; the same command goes on where it stopped.")


@app.command()
def plan(config: Config, set_: Set = None, json: Json = False) -> None:
    """Time the teacher, and say what a build will cost and when it will have paid for itself."""
    from teacher_cache.cost import estimate

    spec = load_spec(config, set_ or ())
    cost = estimate(spec)
    for warning in cost.warnings:
        console.warn(warning)
    hours = {str(count): cost.hours(count) for count in sorted({cost.devices, 1, 2, 4, 8})}
    payback = cost.payback_epochs(spec.views.count)
    if json:
        table = cost.calibration.model_dump(mode="json") if cost.calibration else None
        console.print_json({**vars(cost), "calibration": table, "hours": hours, "payback_epochs": payback})
        return
    _show_calibration(cost.calibration)
    by_field = ", ".join(f"{name} {count}" for name, count in cost.field_bytes.items())
    console.print_facts(
        f"plan of {config}",
        {
            "rows": f"{cost.rows:,} ({spec.views.count} views)",
            "bytes per row": f"{cost.bytes_per_row} ({by_field})",
            "bytes": console.size(cost.bytes),
            "teacher": f"{cost.teacher_seconds_per_row * 1e3:.3f} ms a row on one device",
            "views": f"{cost.render_seconds_per_row * 1e3:.3f} ms a row on one core",
            f"time here ({cost.devices} workers)": _duration(cost.hours(cost.devices)),
            **{f"time on {count} devices": _duration(cost.hours(count)) for count in (2, 4, 8)},
            "paid back after": f"{payback:.1f} student epochs, against running the teacher in each",
        },
    )


def _show_calibration(calibration: Calibration | None) -> None:
    if calibration is None:
        return
    temperatures = list(calibration.table[0].kl)
    header = ["", "encoding", "bytes", *(f"KL T={t}" for t in temperatures), "TV", "top-1"]
    header += [f"grad T={t}" for t in temperatures]
    rows = []
    for item in calibration.table:
        figures = [f"{item.kl[t]:.1e}" for t in temperatures] + [f"{item.total_variation:.1e}", f"{item.top1:.1%}"]
        figures += [f"{item.gradient_error[t]:.1e}" for t in temperatures]
        rows.append(["→" if item.encoding == calibration.chosen else "", item.name, item.bytes, *figures])
    console.print_rows(
        f"encodings of the logits on {calibration.rows} rows: KL, total variation and gradient error, means",
        header,
        rows,
    )


def _duration(hours: float) -> str:
    if hours >= 1:
        return f"{hours:.1f} h"
    return f"{hours * 60:.1f} min" if hours * 60 >= 1 else f"{hours * 3600:.1f} s"


@app.command()
def build(
    config: Config,
    set_: Set = None,
    executor: Annotated[
        Literal["ray", "serial"], typer.Option(help="ray or serial; both write the same bytes.")
    ] = "ray",
    join: Annotated[
        bool, typer.Option("--join", help="Share the work where other processes or hosts build the same cache.")
    ] = False,
    json: Json = False,
) -> None:
    """Build the cache, or go on with it; committed shards are never computed again."""
    from teacher_cache.build import build as run_build

    spec = load_spec(config, set_ or ())
    with console.stoppable(), console.progress_bar("build", "rows") as progress:
        report = run_build(spec, executor, progress, join)
    for warning in report.warnings:
        console.warn(warning)
    if json:
        console.print_json({**vars(report), "rows_per_second": report.rows_per_second})
        return
    facts = {
        "cache": report.path,
        "rows": f"{report.rows:,} samples × {report.views} views",
        "shards": f"{report.shards_total} ({report.shards_built} built in this run)",
        "this run": f"{report.seconds:.1f} s, {report.rows_per_second:,.0f} rows/s" if report.rows_built else None,
        "bytes": console.size(report.bytes),
        "teacher accuracy": _percent(report.teacher_accuracy),
        "tombstones": len(report.tombstones),
        "asked of the service": _paid(report.paid),
        **{f"fidelity of {field}": _figures(found) for field, found in report.fidelity.items()},
    }
    console.print_facts("built", facts)
    _show_tombstones(report.tombstones)


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{share:.2%}"


def _paid(found: dict[str, int | str] | None) -> str | None:
    if found is None:
        return None
    price = f" for {found['spent']}" if "spent" in found else ""
    return f"{found['requests']:,} requests of {found['images']:,} images{price}, by all builds with this journal"


def _figures(found: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in found.items())


def _show_tombstones(tombstones: tuple[tuple[str, str], ...], most: int = 20) -> None:
    if tombstones:
        console.print_rows("samples that could not be decoded (tombstones)", ("key", "reason"), tombstones[:most])
        if len(tombstones) > most:
            console.out.print(f"… and {len(tombstones) - most} more: teacher-cache describe --json lists all")


@app.command()
def abandon(path: CachePath, json: Json = False) -> None:
    """Give up what is being added to a cache; what was sealed before stays."""
    from teacher_cache.abandon import abandon as run_abandon

    report = run_abandon(path)
    if json:
        console.print_json(vars(report))
    else:
        facts = {"cache": report.path, "addition": report.addition, "shards": report.shards, "files": report.files}
        console.print_facts("given up", facts)


@app.command()
def status(path: CachePath, json: Json = False) -> None:
    """Say how much of a cache is committed and who builds it; exit code 1 while it is incomplete."""
    from teacher_cache.lease import at_work
    from teacher_cache.reader import open_cache

    cache = open_cache(path)
    builders = at_work(cache.root)
    committed, planned = cache.shards()
    facts = {
        "cache": str(path),
        "state": cache.manifest.state,
        "shards committed": committed,
        "shards planned": planned,
        "complete": committed == planned,
    }
    if json:
        console.print_json({**facts, "builders": [vars(builder) for builder in builders]})
    else:
        console.print_facts("status", {**facts, "being built by": "\n".join(map(str, builders)) or "nobody"})
    if committed < planned:
        raise typer.Exit(1)


@app.command()
def verify(
    path: CachePath,
    recompute: Annotated[int, typer.Option(min=0, help="Rows to ask of the teacher again.")] = 0,
    views: Annotated[str, typer.Option(help="Views to render again: a number, or `all`.")] = "0",
    source_from: SourceFrom = None,
    json: Json = False,
) -> None:
    """Check every stored byte; exit code 1 when anything is wrong."""
    from teacher_cache.verify import verify as run_verify

    count = _how_many(views)
    if json or not count:
        report = run_verify(path, recompute, count, _source(source_from))
    else:
        with console.progress_bar("views", "views") as update:
            tell = lambda done, total: update(done, total, done)  # noqa: E731 - three arguments from two
            report = run_verify(path, recompute, count, _source(source_from), tell)
    if json:
        console.print_json(
            {**vars(report), "ok": report.ok, "problems": [vars(problem) for problem in report.problems]}
        )
    else:
        facts = {
            "cache": report.path,
            "files": f"{report.files:,} ({console.size(report.bytes)})",
            "views rendered again": report.views_checked or None,
            "rows recomputed": report.rows_recomputed or None,
            "problems": len(report.problems),
        }
        console.print_facts("verify: sound" if report.ok else "verify: NOT SOUND", facts)
        if report.problems:
            _show_problems(report.problems)
        for note in report.notes:
            console.out.print(note)
    if not report.ok:
        raise typer.Exit(1)


@app.command()
def repair(
    path: CachePath,
    source_from: SourceFrom = None,
    remove_strays: Annotated[bool, typer.Option(help="Remove files that belong to nothing.")] = False,
    json: Json = False,
) -> None:
    """Compute bad shards again, and write what comes out as it was committed; exit code 1 when anything is left."""
    from teacher_cache.repair import repair as run_repair

    with console.progress_bar("repair", "rows") as progress:
        report = run_repair(path, _source(source_from), remove_strays, progress)
    if json:
        console.print_json({**vars(report), "ok": report.ok, "left": [vars(problem) for problem in report.left]})
    else:
        facts = {
            "cache": report.path,
            "files written": len(report.written),
            "receipts taken away": len(report.uncommitted) or None,
            "strays removed": len(report.removed) or None,
            "rows computed": f"{report.rows:,} ({report.rows_per_second:,.0f} rows/s)" if report.rows else None,
            "left": len(report.left),
        }
        console.print_facts("repair: sound" if report.ok else "repair: NOT SOUND", facts)
        if report.uncommitted:
            console.out.print("Their shards are no longer committed: teacher-cache build CONFIG makes them again.")
        if report.left:
            _show_problems(report.left)
    if not report.ok:
        raise typer.Exit(1)


def _show_problems(problems: tuple[Problem, ...]) -> None:
    rows = [(problem.place, problem.what, problem.todo) for problem in problems]
    console.print_rows("problems", ("where", "what", "what to do"), rows)


def _how_many(views: str) -> int | Literal["all"]:
    if views == "all":
        return "all"
    if not views.isdecimal():
        raise SpecError("--views", "must be a number or `all`", views, "For example --views 256.")
    return int(views)


def _source(config: Path | None) -> SourceSpec | None:
    return load_spec(config).source if config is not None else None


def _micro_batch(size: int, asked: int | None) -> str:
    return f"{size} rows" if asked is None else f"{size} rows ({asked} asked for, halved until they fitted)"


@app.command()
def describe(path: CachePath, json: Json = False) -> None:
    """Say what a cache is: identity, views, fields, fidelity, tombstones."""
    from teacher_cache.reader import open_cache
    from teacher_cache.views import open_recipe

    cache = open_cache(path)
    manifest, first = cache.manifest, cache.manifest.first
    dead = cache.samples.tombstones
    if json:
        console.print_json({**manifest.model_dump(mode="json"), "tombstones": dead})
        return
    facts = {
        "state": manifest.state,
        "rows": f"{manifest.rows:,} samples × {manifest.views} views",
        "view": f"{first.view_shape}, promise {first.promise}",
        "recipe": first.recipe,
        # A callable is the user's code: describing a cache must not import it.
        "rendered": open_recipe(cache.spec.views).renderer if first.promise == "native" else "image by image",
        "teacher": ", ".join(dict.fromkeys(map(_teacher, manifest.additions))),
        "fields": {name: list(cache.shape_of(name)) for name in cache.fields},
        "encodings": {name: cache.encoding_of(name).name for name in cache.fields},
        "micro-batch": _micro_batch(first.spec["teacher"]["micro_batch"], first.micro_batch_asked),
        "store": f"{manifest.store.kind}, {manifest.store.shard_rows} rows a shard",
        "identity": manifest.whole,
        "tombstones": len(dead),
    }
    if manifest.state == "sealed":
        facts["bytes"] = console.size(cache.totals.bytes)
        facts |= {f"fidelity of {field}": _figures(found) for field, found in cache.totals.fidelity.items()}
    console.print_facts(f"cache {path}", facts)
    _show_history(manifest)
    for addition in manifest.additions:
        _show_calibration(addition.calibration)
    _show_tombstones(dead)


def _teacher(addition: Addition) -> str:
    return f"{addition.teacher} ({addition.spec['teacher']['model']})"


def _show_history(manifest: Manifest) -> None:
    """By which additions a cache came to what it is."""
    rows = []
    for number, item in enumerate(manifest.additions):
        extent = item.extent
        views = f"{extent.first_view}–{extent.view_numbers.stop - 1}" if extent.views > 1 else f"{extent.first_view}"
        span = f"{extent.first_row:,}–{extent.stop_row - 1:,}"
        kept = ", ".join(f"{name} ({item.encodings[name].name})" for name in extent.fields)
        size = console.size(item.totals.bytes) if item.totals else "–"
        rows.append((number, span, views, extent.teacher, kept, size, item.state))
    console.print_rows("history", ("", "rows", "views", "teacher", "fields", "bytes", "state"), rows)


@app.command()
def report(
    path: CachePath,
    html: Annotated[Path, typer.Option(help="The page to write.")],
    comparison: Annotated[Path | None, typer.Option(help="result.json of student-train compare.")] = None,
    source_from: SourceFrom = None,
) -> None:
    """Write a self-contained HTML page: targets, fidelity, a gallery of views, training curves."""
    from teacher_cache.report import write_report

    written = write_report(path, html, comparison, _source(source_from))
    console.out.print(f"wrote {written} ({console.size(written.stat().st_size)})")


@app.command()
def export(
    path: CachePath,
    output: Annotated[Path, typer.Option(help="The .npz file to write.")],
    field: Annotated[str, typer.Option(help="Which field.")] = "logits",
    view: Annotated[int, typer.Option(help="Which view.")] = 0,
) -> None:
    """Write one field of one view as a plain .npz: keys, row numbers, labels and the stored parts."""
    import io

    import numpy as np

    from teacher_cache.reader import open_cache
    from teacher_cache.storage import write_atomic
    from teacher_cache.storage.root import require_here

    require_here("--output", output)
    cache = open_cache(path)
    rows = np.flatnonzero(cache.alive)
    columns = cache.columns(field, view, rows)
    labels = {} if cache.labels is None else {"labels": cache.labels[rows]}
    keys = np.array([cache.samples.key(row) for row in rows.tolist()])
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, keys=keys, rows=rows, **labels, **columns)
    write_atomic(output.parent, output.name, buffer.getvalue())
    console.out.print(f"wrote {output}: {len(rows):,} rows of {field}, view {view}")


if __name__ == "__main__":
    sys.exit(main())
