"""The verb `targets`: which there are, what one of them states, and what a TOML file of one's own may state."""

from __future__ import annotations

import dataclasses
import inspect
import json
import typing
from typing import Any

import click

from hwopt.cli.files import print_table
from hwopt.cli.options import JSON
from hwopt.errors import UsageError, did_you_mean
from hwopt.target import Memory, Target, origin


@click.command()
@click.argument("name", default="")
@JSON
def targets(name: str, as_json: bool) -> None:
    """List the targets: name, kind, what they are. `--target mine.toml` takes hardware of your own, by its figures.

    With a NAME or a file, what that target states; with a kind of file (systolic, npu, gpu, cpu), the keys that it may have.
    """
    from hwopt.plugins import find_target, find_target_files, find_targets

    known, kinds = find_targets(), find_target_files()
    if name in kinds:
        _show(f'{name}: {inspect.getdoc(kinds[name])}\nname = "...", kind = "{name}" and:', keys_of(kinds[name]), as_json)
    elif name in known or name.endswith(".toml"):
        target = find_target(name)
        _show(f"{target.name}: {target.summary}", facts_of(target), as_json)
    elif name:
        raise UsageError(f"unknown target {name!r}", hint=did_you_mean(name, [*known, *kinds]))
    else:
        print_table([row_of(target) for target in known.values()], as_json)


def row_of(target: Target) -> dict[str, Any]:
    """A target in the list of all."""
    facts = {"name": target.name, "kind": target.kind, "cores": target.cores, "runs here": target.runs_here}
    return facts | {"prices": origin(target.cost), "summary": target.summary}


def _show(title: str, rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({"title": title, "rows": rows}, indent=1))
        return
    click.echo(f"{title}\n")
    print_table(rows, as_json=False)


def facts_of(target: Target) -> list[dict[str, str]]:
    """What a target states, a row for each fact."""
    facts = {
        "kind": target.kind,
        "cores": str(target.cores),
        "runs here": "yes" if target.runs_here else "no",
        "prices": origin(target.cost),
        **{f"peak {dtype}": f"{peak / 1e9:.4g} billion operations a second and core" for dtype, peak in target.peak.items()},
        **{f"memory {one.name}": f"{one.bytes} bytes, {one.bytes_per_second / 1e9:.4g} GB/s" for one in target.memories},
        **{f"granule {dtype}": f"{count} channels" for dtype, count in target.granule.items()},
        "needs": ", ".join(target.features) or "nothing in particular",
        "compiler": " ".join(f"{key}={value}" for key, value in target.tvm.items() if isinstance(value, str)),
    }
    return [{"fact": fact, "value": value} for fact, value in facts.items()]


def keys_of(kind: type) -> list[dict[str, str]]:
    """The keys of a TOML file, a row for each; those of its tables follow theirs."""
    rows, hints = [], typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        needed = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        tables = hints[field.name] == tuple[Memory, ...]
        key = f"[[{field.name}]]" if tables else field.name
        rows.append({"key": key, "value": _said(hints[field.name]), "default": "needed" if needed else _printed(field.default)})
        rows += [{**row, "key": f"  {row['key']}"} for row in keys_of(Memory)] if tables else []
    return rows


def _printed(value: Any) -> str:
    if value is None or value == ():
        return "none"
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def _said(kind: Any) -> str:
    """A type as who writes the file would say it."""
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Literal:
        return " or ".join(map(repr, arguments))
    if typing.get_origin(kind) is tuple:
        return "tables, nearest first" if arguments[0] is Memory else f"a list of {_said(arguments[0]).split()[-1]}s"
    if arguments:
        return _said(next(one for one in arguments if one is not type(None)))
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
    return names.get(kind, "a file beside this one")
