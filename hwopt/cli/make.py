"""The verbs that make something of a model: compile, plan, apply, demo."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import click

from hwopt.cli.files import check_parent, page_of, summary_of
from hwopt.cli.options import (
    BIND,
    CALIBRATE,
    CHECK,
    ERRORS,
    JSON,
    MODEL,
    PASSES,
    PREPROCESS,
    REPORT,
    SEED,
    SHAPE,
    TARGET,
    THREADS,
    TRAIN,
    TUNING_DB,
    WORKERS,
    building,
    form_arguments,
    job_arguments,
    planning,
    recovering,
)
from hwopt.cli.progress import ProgressBar
from hwopt.files import write_whole


@click.command("compile")
@MODEL
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="The artifact's folder.")
@click.option("--name", default=None, help="Name of the C functions and files; the model file's name if not given.")
@planning
@click.option("--plan", "plan_file", type=click.Path(path_type=Path), help="Replay this plan instead of searching.")
@TUNING_DB
@click.option("--tune", "effort", metavar="200|90s|5m", help="Search faster schedules before a build: so many, or so long.")
@WORKERS
@click.option("--check", type=click.Choice(["none", "doubtful", "all"]), default="doubtful", show_default=True, help=CHECK)
@recovering
@building
@REPORT
@JSON
def compile_(
    model: Path, out: Path, as_json: bool, plan_file: Path | None, effort: str | None, report: Path | None, **options: Any
) -> None:
    """Optimize MODEL and compile it into a library that needs neither Python nor TVM."""
    job = form_arguments(job_arguments(options))
    if report:
        check_parent(report)
    from hwopt.cache import Cache, cache_folder
    from hwopt.delivery import deliver

    if effort:
        from hwopt.tuning import parse_effort  # what it imports takes a second

        job |= {"tune": parse_effort(effort)}
    with ProgressBar() as progress:
        artifact, kept = deliver(model, out, cache=Cache(cache_folder()), plan=plan_file, progress=progress, **job)
    if report:
        write_whole(report, page_of(out))
    click.echo(json.dumps(artifact.report, indent=1, sort_keys=True) if as_json else summary_of(artifact.report, out))
    made = artifact.manifest["name"]
    if options["name"] not in (None, made):
        click.echo(f"note: --name {options['name']} became {made}, as the names of C functions ask for", err=True)
    if kept and not as_json:
        click.echo("from the cache (hwopt cache)")


@click.command()
@MODEL
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="plan.json; a folder with --search, --pareto.")
@planning
@click.option("--search", "method", metavar="bayesian|random|grid", help="Search criteria, calibrators, group sizes too.")
@click.option("--trials", type=click.IntRange(1), default=20, show_default=True, help="In all; earlier ones in the folder count.")
@click.option("--pareto", "cost", metavar="latency|size|energy", help="A front of plans: the score against this cost.")
@click.option(
    "--points", type=click.IntRange(2), default=8, show_default=True, help="Of the front; those in the folder are kept."
)
@click.option("--tie/--no-tie", default=True, help="Decide isomorphic layers once, where that is proven to lose nothing.")
@click.option("--sensitivity", type=click.Choice(["auto", "fisher", "measured"]), default="auto", show_default=True, help=ERRORS)
@recovering
@click.option("--pairwise", is_flag=True, help="Also what changes of neighbouring layers cost together (needs torch).")
@REPORT
def plan(model: Path, out: Path, report: Path | None, **options: Any) -> None:
    """Decide what to change in MODEL, layer by layer, and write the decisions; nothing is compiled."""
    from hwopt.explore import job_of, planned
    from hwopt.plan.explain import explain
    from hwopt.report.summary import front_table

    ways = {name: options.pop(name) for name in ("method", "trials", "cost", "points", "tie")}
    errors = {name: options.pop(name) for name in ("sensitivity", "pairwise")}
    for file in (out, *([report] if report else [])):
        check_parent(file, folder=file is out and bool(ways["method"] or ways["cost"]))
    with ProgressBar() as progress:
        job = dataclasses.replace(job_of(model, job_arguments(options) | {"progress": progress}), **errors)
        found, file, html, points = planned(job, out, **ways)
    if report:
        write_whole(report, html)
    if points:
        click.echo(front_table(points) + "\n")
    click.echo(explain(found.plan).split("\nrefused (", 1)[0])
    click.echo(f"wrote {file}; hwopt explain {file} shows every refusal")


@click.command("apply")
@MODEL
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="The ONNX file to write.")
@click.option("--plan", "plan_file", type=click.Path(path_type=Path), help="A plan to replay.")
@TRAIN
@PASSES
@TARGET
@SHAPE
@BIND
@CALIBRATE
@PREPROCESS
@SEED
def apply_(model: Path, out: Path, plan_file: Path | None, **options: Any) -> None:
    """Apply a plan, or passes such as 'low-rank{site=fc1,rank=16},quantize', to MODEL and write it as ONNX."""
    from hwopt.compiler import apply_model
    from hwopt.io.onnx import save

    job = job_arguments(options)
    graph, refused = apply_model(model, plan=plan_file, **job)
    save(graph, out)
    for one in refused:
        click.echo(f"{one.by} at {one.site}: {one.reason}", err=True)
    click.echo(f"wrote {out}")


@click.command()
@click.option("-o", "--out", type=click.Path(path_type=Path), default=Path("build/demo"), show_default=True)
@TARGET
@THREADS
@JSON
def demo(out: Path, target: str, threads: int | None, as_json: bool) -> None:
    """Compress and compile the embedded Fashion-MNIST model, and compare it with float and with ONNX Runtime."""
    from hwopt.demo import run_demo

    with ProgressBar() as progress:
        report = run_demo(out, target=target, threads=threads, progress=progress)
    click.echo(json.dumps(report, indent=1, sort_keys=True) if as_json else summary_of(report, out))
