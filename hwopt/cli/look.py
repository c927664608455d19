"""The verbs that show something and change nothing: print, diff, explain, passes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from hwopt.cli.files import page_of, print_table, read_graph, read_text
from hwopt.cli.options import BIND, JSON, MODEL, REPORT, SHAPE
from hwopt.errors import UsageError, did_you_mean
from hwopt.files import write_whole

NO_PLAN = "give an artifact's folder or a plan.json"


@click.command("print")
@MODEL
@click.option("--history", is_flag=True, help="Show which passes made each node of an artifact.")
@SHAPE
@BIND
def print_(model: Path, history: bool, shapes: tuple[str, ...], binds: tuple[str, ...]) -> None:
    """Print a model as hwopt sees it. MODEL is an ONNX file or an artifact."""
    from hwopt.ir import to_text

    if history and not model.is_dir():
        raise UsageError("an ONNX file does not say which passes made it", place=str(model), hint="print an artifact's folder")
    graph = read_graph(model, shapes, binds)
    click.echo((model / "graph.txt").read_text() if history else to_text(graph), nl=False)


@click.command()
@click.argument("before", type=click.Path(path_type=Path))
@click.argument("after", type=click.Path(path_type=Path))
def diff(before: Path, after: Path) -> None:
    """Show how two models (ONNX files or artifacts) differ; exit code 1 if they do."""
    from hwopt.ir import diff as difference

    text = difference(read_graph(before), read_graph(after))
    if text:
        click.echo(text)
        raise click.exceptions.Exit(1)


@click.command("explain")
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--layer", default="", help="Only this layer.")
@REPORT
def explain_(source: Path, layer: str, report: Path | None) -> None:
    """Why did this layer get that? SOURCE is a plan.json or an artifact (whose page --report can write)."""
    from hwopt.plan.explain import explain
    from hwopt.plan.plan import plan_from_json

    path = source / "plan.json" if source.is_dir() else source
    plan = plan_from_json(read_text(path, NO_PLAN), str(path))
    if report:
        write_whole(report, page_of(source))
    click.echo(explain(plan, layer), nl=False)


@click.command()
@click.argument("name", default="")
@JSON
def passes(name: str, as_json: bool) -> None:
    """List the passes: name, family, what they do. With a NAME, also of a way to --recover: everything that it can be told."""
    from hwopt.plugins import find_passes

    if name:
        _show_pass(name, as_json)
        return
    rows = [
        {"name": name, "phase": kind.phase.name.lower(), "exact": kind.exact, "summary": kind.summary}
        for name, kind in find_passes().items()
    ]
    print_table(rows, as_json)


def _show_pass(name: str, as_json: bool) -> None:
    from hwopt.cli.knobs import described, knobs_of
    from hwopt.plugins import find_passes
    from hwopt.recover import RECIPES

    known: dict[str, Any] = {**find_passes(), **RECIPES}
    if name not in known:
        raise UsageError(f"unknown pass {name!r}", hint=did_you_mean(name, known))
    kind = known[name]
    if as_json:
        row = {"name": name, "summary": kind.summary, "description": described(kind), "options": knobs_of(kind)}
        click.echo(json.dumps(row, indent=1))
    else:
        click.echo(f"{name}: {kind.summary}\n\n{described(kind)}\n")
        print_table(knobs_of(kind), as_json=False)
