"""The command line: one function per verb."""

from __future__ import annotations

import dataclasses
import errno
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np

from hwopt.cli_device import device, naming_device, take_device
from hwopt.errors import HwoptError, UsageError
from hwopt.plan.budget import parse_budget
from hwopt.progress import ProgressBar, TuningBar

Command = Callable[..., Any]
MODEL = click.argument("model", type=click.Path(path_type=Path))
SHAPE = click.option("--shape", "shapes", multiple=True, metavar="NAME=1,3,224,224", help="Freeze an input's dimensions.")
BIND = click.option("--bind", "binds", multiple=True, metavar="NAME=VALUE", help="Make an input a constant.")
TARGET = click.option(
    "--target", default="host", show_default=True, help="Hardware (see: hwopt targets), or CPUs, best first: a,b."
)
THREADS = click.option("--threads", type=click.IntRange(1), default=None, help="Threads; all cores of the target if not given.")
SEED = click.option("--seed", type=int, default=0, show_default=True)
JSON = click.option("--json", "as_json", is_flag=True, help="Print data instead of text.")
CALIBRATE = click.option("--calibrate", type=click.Path(path_type=Path), help="An .npz with inputs by name.")
EVALUATE = click.option("--evaluate", metavar="NPZ|MODULE:FUNCTION", help="An .npz (inputs, labels) or a scoring function.")
MAX_DROP = click.option("--max-drop", default="1%", show_default=True, help="How much the score may fall.")
BUDGET = click.option(
    "--budget", "limits", multiple=True, metavar="latency=2ms|size=1MB|memory=4MB|energy=2mJ", help="Further limits."
)
TUNING_DB = click.option(
    "--tuning-db",
    type=click.Path(path_type=Path),
    help="Tuned schedules. tune writes to the user's own database if not given; compile reads only what is given.",
)
PASSES = click.option(
    "--passes", "passes", default=None, help="Families to consider, by comma; name{...} is applied in any case."
)


ERRORS = "How the errors of changes are found: by gradients (torch), by running each, or by what takes less time."
CHECK = "Leave changes out once; those without which the model is faster stay out."
REPORT = click.option("--report", type=click.Path(path_type=Path), help="Write a page for people, one HTML file.")
BUILDING = (
    click.option("--emit", default="shared,source", show_default=True, help="Products: shared, static, object, source, pc."),
    click.option("--parallel", type=click.Choice(["pthread", "openmp", "serial"]), default="pthread", show_default=True),
    click.option("--no-heap", is_flag=True, help="A run lives in the caller's workspace alone (with --parallel serial)."),
    click.option("--no-measure", is_flag=True, help="Time nothing: same inputs, same bytes, and the cache is used."),
    click.option("--install", type=click.Path(path_type=Path), help="Copy the libraries and the header to this folder, too."),
    click.option("--depfile", type=click.Path(path_type=Path), help="Write what was read, for make and Ninja."),
)


def building(command: Command) -> Command:
    """The options of a compilation that say what is delivered, and to whom."""
    for option in reversed(BUILDING):
        command = option(command)
    return command


def planning(command: Command) -> Command:
    """The options of every command that decides what to change."""
    for option in (PASSES, BUDGET, MAX_DROP, EVALUATE, CALIBRATE, BIND, SHAPE, TARGET, SEED, THREADS):
        command = option(command)
    return command


def _show_cmake_dir(context: click.Context, _: click.Parameter, asked: bool) -> None:
    if asked:
        click.echo(Path(__file__).with_name("cmake"))
        context.exit()


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(package_name="hwopt")
@click.option("--cmake-dir", is_flag=True, is_eager=True, expose_value=False, callback=_show_cmake_dir, help="For find_package.")
def cli() -> None:
    """Compile a trained model for one piece of hardware, as small and fast as an accuracy budget allows."""


@cli.command("compile")
@MODEL
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="The artifact's folder.")
@click.option("--name", default=None, help="Name of the C functions and files; the model file's name if not given.")
@planning
@click.option("--plan", "plan_file", type=click.Path(path_type=Path), help="Replay this plan instead of searching.")
@TUNING_DB
@click.option("--tune", "effort", metavar="200|90s|5m", help="Search faster schedules first: so many candidates, or so long.")
@click.option("--check", type=click.Choice(["none", "doubtful", "all"]), default="doubtful", show_default=True, help=CHECK)
@building
@REPORT
@JSON
def compile_(
    model: Path, out: Path, as_json: bool, plan_file: Path | None, effort: str | None, report: Path | None, **options: Any
) -> None:
    """Optimize MODEL and compile it into a library that needs neither Python nor TVM."""
    job = _form(_job(options))
    from hwopt.cache import Cache, cache_folder
    from hwopt.delivery import deliver
    from hwopt.tuning import parse_effort

    job |= {"tune": parse_effort(effort) if effort else None}
    with ProgressBar() as progress:
        artifact, kept = deliver(model, out, cache=Cache(cache_folder()), plan=plan_file, progress=progress, **job)
    if report:
        _write(report, _page(out))
    click.echo(json.dumps(artifact.report, indent=1, sort_keys=True) if as_json else _summary(artifact.report, out))
    if kept and not as_json:
        click.echo("from the cache (hwopt cache)")


@cli.command()
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
@click.option("--pairwise", is_flag=True, help="Also what changes of neighbouring layers cost together (needs torch).")
@REPORT
def plan(model: Path, out: Path, report: Path | None, **options: Any) -> None:
    """Decide what to change in MODEL, layer by layer, and write the decisions; nothing is compiled."""
    from hwopt.explore import job_of, planned
    from hwopt.plan.explain import explain

    ways = {name: options.pop(name) for name in ("method", "trials", "cost", "points", "tie")}
    errors = {name: options.pop(name) for name in ("sensitivity", "pairwise")}
    for file in (out, *([report] if report else [])):
        _check_parent(file, folder=file is out and bool(ways["method"] or ways["cost"]))
    with ProgressBar() as progress:
        job = dataclasses.replace(job_of(model, _job(options) | {"progress": progress}), **errors)
        found, file, html = planned(job, out, **ways)
    if report:
        _write(report, html)
    click.echo(explain(found.plan).split("\nrefused (", 1)[0])
    click.echo(f"wrote {file}; hwopt explain {file} shows every refusal")


@cli.command("apply")
@MODEL
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="The ONNX file to write.")
@click.option("--plan", "plan_file", type=click.Path(path_type=Path), help="A plan to replay.")
@PASSES
@TARGET
@SHAPE
@BIND
@CALIBRATE
@SEED
def apply_(model: Path, out: Path, plan_file: Path | None, **options: Any) -> None:
    """Apply a plan, or passes such as 'low-rank{site=fc1,rank=16},quantize', to MODEL and write it as ONNX."""
    from hwopt.compiler import apply_model
    from hwopt.io.onnx import save

    job = _job(options)
    graph, refused = apply_model(model, plan=plan_file, **job)
    save(graph, out)
    for one in refused:
        click.echo(f"{one.by} at {one.site}: {one.reason}", err=True)
    click.echo(f"wrote {out}")


@cli.command("explain")
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--layer", default="", help="Only this layer.")
@REPORT
def explain_(source: Path, layer: str, report: Path | None) -> None:
    """Why did this layer get that? SOURCE is a plan.json or an artifact (whose page --report can write)."""
    from hwopt.plan.explain import explain
    from hwopt.plan.plan import plan_from_json

    path = source / "plan.json" if source.is_dir() else source
    plan = plan_from_json(_read(path), str(path))
    if report:
        _write(report, _page(source))
    click.echo(explain(plan, layer), nl=False)


@cli.command("print")
@MODEL
@click.option("--history", is_flag=True, help="Show which passes made each node.")
@SHAPE
@BIND
def print_(model: Path, history: bool, shapes: tuple[str, ...], binds: tuple[str, ...]) -> None:
    """Print a model as hwopt sees it. MODEL is an ONNX file or an artifact."""
    from hwopt.ir import to_text

    click.echo(to_text(_graph(model, shapes, binds), history=history), nl=False)


@cli.command()
@click.argument("before", type=click.Path(path_type=Path))
@click.argument("after", type=click.Path(path_type=Path))
def diff(before: Path, after: Path) -> None:
    """Show how two models (ONNX files or artifacts) differ; exit code 1 if they do."""
    from hwopt.ir import diff as difference

    text = difference(_graph(before), _graph(after))
    if text:
        click.echo(text)
        raise click.exceptions.Exit(1)


@cli.command()
@JSON
def passes(as_json: bool) -> None:
    """List the passes: name, family, what they do."""
    from hwopt.plugins import find_passes

    rows = [
        {"name": name, "phase": kind.phase.name.lower(), "exact": kind.exact, "summary": kind.summary}
        for name, kind in find_passes().items()
    ]
    _table(rows, as_json)


@cli.command()
@JSON
def targets(as_json: bool) -> None:
    """List the targets: name, kind, what they are. `--target mine.toml` takes hardware of your own, by its figures."""
    from hwopt.plugins import find_targets

    rows = [
        {"name": t.name, "kind": t.kind, "cores": t.cores, "runs here": t.runs_here, "summary": t.summary}
        for t in find_targets().values()
    ]
    _table(rows, as_json)


@cli.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.argument("inputs", type=click.Path(path_type=Path))
@click.argument("outputs", type=click.Path(path_type=Path))
def run(artifact: Path, inputs: Path, outputs: Path) -> None:
    """Run ARTIFACT on the arrays in INPUTS (.npz) and write OUTPUTS (.npz)."""
    from hwopt.artifact import Artifact
    from hwopt.samples import LABELS, read_npz, write_npz

    _check_parent(outputs)
    model, arrays = Artifact(artifact), read_npz(inputs)
    if LABELS not in {tensor.name for tensor in model.inputs}:
        arrays.pop(LABELS, None)  # the file that was compiled with may also be run
    write_npz(outputs, model.run(arrays))


@cli.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--runs", type=click.IntRange(1), default=100, show_default=True)
@THREADS
@JSON
def bench(artifact: Path, runs: int, threads: int | None, as_json: bool) -> None:
    """Time ARTIFACT on this machine: median, spread, throughput."""
    from hwopt.artifact import Artifact

    timing = Artifact(artifact).bench(runs=runs, threads=threads)
    shown = {key.replace("_seconds", " ms"): value * 1e3 for key, value in timing.items() if key.endswith("_seconds")}
    _table([timing] if as_json else [{**shown, "runs": runs, "threads": timing["threads"]}], as_json)


@cli.command()
@MODEL
@click.option("--trials", type=click.IntRange(1), help="How many candidates to measure.")
@click.option("--time", "duration", metavar="90s|5m|1h", help="How long to search.")
@click.option("--target", default=None, help="The target; an artifact's own, else host.")
@click.option("--workers", metavar="ADDRESS", help="A Dask cluster that builds the candidates; local processes if not given.")
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
        found = tune_model(model, effort, workers=workers, device=take_device(options), watch=watch, **_job(options))
    data = report_data(found)
    if as_json:
        click.echo(json.dumps(data, indent=1))
        return
    _table(data["kernels"], False)
    click.echo(data["summary"])


@cli.command()
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
    _table([facts], as_json)


@cli.command()
@click.option("-o", "--out", type=click.Path(path_type=Path), default=Path("build/demo"), show_default=True)
@TARGET
@THREADS
@JSON
def demo(out: Path, target: str, threads: int | None, as_json: bool) -> None:
    """Compress and compile the embedded Fashion-MNIST model, and compare it with float and with ONNX Runtime."""
    from hwopt.demo import run_demo

    with ProgressBar() as progress:
        report = run_demo(out, target=target, threads=threads, progress=progress)
    click.echo(json.dumps(report, indent=1, sort_keys=True) if as_json else _summary(report, out))


cli.add_command(device)


def main(arguments: list[str] | None = None) -> None:
    """The entry point: every error ends as one line and an exit code."""
    if "" not in sys.path:  # --evaluate module:function finds modules where the user stands, as python -m does
        sys.path.insert(0, "")
    try:
        code = cli.main(arguments, prog_name="hwopt", standalone_mode=False)
    except HwoptError as error:
        _fail(str(error), error.exit_code)
    except click.UsageError as error:
        error.show()
        sys.exit(2)
    except click.ClickException as error:
        _fail(error.format_message(), 1)
    except (KeyboardInterrupt, click.Abort):
        _fail("interrupted", 130)
    except RuntimeError as error:  # an interrupt inside of an import arrives wrapped
        if not isinstance(error.__cause__ or error.__context__, KeyboardInterrupt):
            raise
        _fail("interrupted", 130)
    except OSError as error:
        reason = "no space left on the disk" if error.errno == errno.ENOSPC else error.strerror or str(error)
        _fail(f"{error.filename or 'output'}: {reason}", 1)
    else:
        sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int) -> None:
    click.echo(f"hwopt: error: {message}", err=True)
    sys.exit(code)


def _job(options: dict[str, Any]) -> dict[str, Any]:
    """Options of the command line as arguments of the Python API."""
    job = dict(options)
    job["shapes"] = dict(_shape(text) for text in job.pop("shapes", ()))
    job["binds"] = dict(_bind(text) for text in job.pop("binds", ()))
    if "max_drop" in job:
        job["budget"] = parse_budget(job.pop("max_drop"), job.pop("limits"))
    return job


def _form(job: dict[str, Any]) -> dict[str, Any]:
    from hwopt.emit.products import Form, parse_emit

    form = Form(parse_emit(job.pop("emit")), job.pop("parallel"), not job.pop("no_heap"))
    return job | {"form": form, "measure": not job.pop("no_measure")}


def _shape(text: str) -> tuple[str, tuple[int, ...]]:
    name, equals, dims = text.rpartition("=")
    try:
        shape = tuple(int(dim) for dim in dims.split(",")) if dims else ()
    except ValueError as error:
        raise UsageError(f"cannot read {dims!r}", place=f"--shape {text}", hint="write --shape input=1,3,224,224") from error
    if not equals or any(dim < 1 for dim in shape):
        raise UsageError("needs a name and sizes above zero", place=f"--shape {text}", hint="write --shape input=1,3,224,224")
    return name, shape


def _bind(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    try:
        if not equals:
            raise ValueError(text)
        return name, np.asarray(json.loads(value))
    except ValueError as error:
        raise UsageError("needs a name and a number or a [list]", place=f"--bind {text}", hint="write --bind sr=16000") from error


def _graph(path: Path, shapes: tuple[str, ...] = (), binds: tuple[str, ...] = ()) -> Any:
    """A model file as it stands (or frozen as asked), or the model inside of an artifact."""
    from hwopt.io.onnx import load, read

    file = path / "model.onnx" if path.is_dir() else path
    if shapes or binds:
        return load(file, shapes=dict(map(_shape, shapes)), binds=dict(map(_bind, binds)))
    return read(file)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except FileNotFoundError as error:
        raise UsageError("no such file", place=str(path)) from error
    except UnicodeDecodeError as error:
        raise UsageError("not a text file", place=str(path)) from error


def _check_parent(path: Path, folder: bool = False) -> None:
    """Before long work: the folder of a result must exist and the result be a file, or a folder where that is asked for."""
    if not path.parent.is_dir():
        raise UsageError("the folder does not exist", place=str(path.parent), hint="make it first")
    if path.is_dir() and not folder:
        raise UsageError("is a folder", place=str(path), hint="name a file")


def _write(path: Path, text: str) -> None:
    """Written under another name first: an interrupted command leaves nothing half done."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    part.replace(path)


def _page(artifact: Path) -> str:
    """The page of an artifact."""
    from hwopt.page.page import page
    from hwopt.plan.plan import plan_from_json

    if not artifact.is_dir():
        raise UsageError("is no artifact", place=str(artifact), hint="hwopt plan writes the page of a plan: --report page.html")
    plan = plan_from_json(_read(artifact / "plan.json"), str(artifact))
    return page(json.loads(_read(artifact / "report.json")), plan)


def _table(rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(rows if len(rows) != 1 else rows[0], indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(*rows[0].keys(), box=None)
    for row in rows:
        table.add_row(*(f"{value:.6g}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def _summary(report: dict[str, Any], out: Path) -> str:
    from hwopt.report import summary

    return summary(report) + f"\nartifact: {out}"
