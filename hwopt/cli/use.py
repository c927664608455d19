"""The verbs for what has been built: run, bench, tune, cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from hwopt.cli.device import naming_device, take_device
from hwopt.cli.files import check_parent, print_table
from hwopt.cli.options import BIND, JSON, MODEL, SEED, SHAPE, THREADS, TUNING_DB, WORKERS, job_arguments
from hwopt.cli.progress import TuningBar
from hwopt.errors import UsageError
from hwopt.plan.budget import parse_budget


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.argument("inputs", type=click.Path(path_type=Path))
@click.argument("outputs", type=click.Path(path_type=Path))
def run(artifact: Path, inputs: Path, outputs: Path) -> None:
    """Run ARTIFACT on the arrays in INPUTS (.npz) and write OUTPUTS (.npz)."""
    from hwopt.artifact import Artifact
    from hwopt.samples import CLASSES, LABELS, TEXTS, read_npz, write_npz

    check_parent(outputs)
    model, arrays = Artifact(artifact), read_npz(inputs)
    for beside in {LABELS, TEXTS, CLASSES} - {tensor.name for tensor in model.inputs}:
        arrays.pop(beside, None)  # the file that was compiled with may also be run
    write_npz(outputs, model.run(arrays))


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--runs", type=click.IntRange(1), default=100, show_default=True)
@THREADS
@JSON
def bench(artifact: Path, runs: int, threads: int | None, as_json: bool) -> None:
    """Time ARTIFACT on this machine: median, spread, throughput."""
    from hwopt.artifact import Artifact

    timing = Artifact(artifact).bench(runs=runs, threads=threads)
    shown = {key.replace("_seconds", " ms"): value * 1e3 for key, value in timing.items() if key.endswith("_seconds")}
    print_table([timing] if as_json else [{**shown, "runs": runs, "threads": timing["threads"]}], as_json)


@click.command()
@MODEL
@click.option("--trials", type=click.IntRange(1), help="How many candidates to measure.")
@click.option("--time", "duration", metavar="90s|5m|1h", help="How long to search.")
@click.option("--target", default=None, help="The target; an artifact's own, else host.")
@WORKERS
@naming_device
@TUNING_DB
@SHAPE
@BIND
@THREADS
@SEED
@JSON
def tune(model: Path, trials: int | None, duration: str | None, workers: str | None, as_json: bool, **options: Any) -> None:
    """Search faster schedules for the kernels of MODEL (an ONNX file or an artifact) and keep them in a database.

    An interrupted search keeps what it has measured; the next one goes on from there.
    """
    from hwopt.tuning import parse_effort, report_data, tune_model

    if (trials is None) == (duration is None):
        raise UsageError("needs an end", place="hwopt tune", hint="give --trials 200 or --time 5m")
    effort = parse_effort(str(trials) if trials else str(duration))
    with TuningBar() as watch:
        found = tune_model(model, effort, workers=workers, device=take_device(options), watch=watch, **job_arguments(options))
    data = report_data(found)
    if as_json:
        click.echo(json.dumps(data, indent=1))
        return
    print_table(data["kernels"], False)
    click.echo(data["summary"])


@click.command()
@click.option("--prune", is_flag=True, help="Remove what --keep and --days do not allow, least recently used first; all without.")
@click.option("--keep", metavar="1GB", help="How large it may stay.")
@click.option("--days", type=click.FloatRange(0), help="How long an entry may stay unused.")
@JSON
def cache(prune: bool, keep: str | None, days: float | None, as_json: bool) -> None:
    """Show or prune the cache of builds (HWOPT_CACHE_DIR, else in XDG_CACHE_HOME)."""
    from hwopt.cache import Cache, cache_folder

    store = Cache(cache_folder())
    if prune:
        most = parse_budget(0, (f"size={keep}",)).weight_bytes if keep else (None if days is not None else 0)
        freed = store.prune(most, None if days is None else days * 86400)
        click.echo(f"{freed} bytes freed")
    entries = list(store.entries())
    facts = {"folder": str(store.folder), "entries": len(entries), "bytes": sum(entry.bytes for entry in entries)}
    print_table([facts], as_json)
