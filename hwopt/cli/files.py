"""What the verbs read and write: files, pages, tables."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from hwopt.cli.options import read_bind, read_shape
from hwopt.errors import UsageError
from hwopt.files import check_writable


def read_graph(path: Path, shapes: tuple[str, ...] = (), binds: tuple[str, ...] = ()) -> Any:
    """A model file as it stands (or frozen as asked), or the model inside of an artifact."""
    from hwopt.io.onnx import load, read

    file = path / "model.onnx" if path.is_dir() else path
    if shapes or binds:
        return load(file, shapes=dict(map(read_shape, shapes)), binds=dict(map(read_bind, binds)))
    return read(file)


def read_text(path: Path, hint: str = "") -> str:
    """The text of a file that the user named; the hint says which files are meant."""
    try:
        return path.read_text()
    except FileNotFoundError as error:
        raise UsageError("no such file", place=str(path), hint=hint) from error
    except UnicodeDecodeError as error:
        raise UsageError("is no text", place=str(path), hint=hint) from error


def check_parent(path: Path, folder: bool = False) -> None:
    """Before long work: the folder of a result must exist and the result be a file, or a folder where that is asked for."""
    if not path.parent.is_dir():
        raise UsageError("the folder does not exist", place=str(path.parent), hint="make it first")
    if path.is_dir() and not folder:
        raise UsageError("is a folder", place=str(path), hint="name a file")
    if not path.exists():
        check_writable(path)


def page_of(artifact: Path) -> str:
    """The page of an artifact."""
    from hwopt.plan.plan import plan_from_json
    from hwopt.report.page import page

    if not artifact.is_dir():
        raise UsageError("is no artifact", place=str(artifact), hint="hwopt plan writes the page of a plan: --report page.html")
    plan = plan_from_json(read_text(artifact / "plan.json"), str(artifact))
    return page(json.loads(read_text(artifact / "report.json")), plan)


def print_table(rows: list[dict[str, Any]], as_json: bool) -> None:
    """Rows for people, one line each, or as JSON: one row as an object, more as a list."""
    if as_json:
        click.echo(json.dumps(rows if len(rows) != 1 else rows[0], indent=1))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text  # brackets in names are no markup

    table = Table(*rows[0].keys(), box=None)
    for row in rows:
        table.add_row(*(Text(f"{value:.6g}" if isinstance(value, float) else str(value)) for value in row.values()))
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def summary_of(report: dict[str, Any], out: Path) -> str:
    """What was reached, in a few lines, and where it lies."""
    from hwopt.report.summary import summary

    return summary(report) + f"\nartifact: {out}"
