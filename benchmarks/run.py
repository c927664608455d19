"""`python -m benchmarks.run SUITE [--json FILE]`: every number that the README claims, measured again."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

SUITES = ("demo",)


@click.command()
@click.argument("suite", type=click.Choice(SUITES))
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write the result here.")
@click.option("--threads", type=click.IntRange(1), default=None)
def main(suite: str, file: Path | None, threads: int | None) -> None:
    """Measure one SUITE on this machine."""
    found = importlib.import_module(f"benchmarks.{suite}").run(threads=threads)
    if file is not None:
        file.write_text(json.dumps(found, indent=1) + "\n")
    table = Table("case", "metric", "unit", "ours", "peers", "ratio", box=None)
    for row in found["rows"]:
        peers = ", ".join(f"{name} {value:.4g}" for name, value in row["peers"].items())
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.3f}"
        table.add_row(row["case"], row["metric"], row["unit"], f"{row['ours']:.4g}", peers, ratio)
    Console(width=140).print(table)
    Console().print_json(json.dumps(found["summary"]))


if __name__ == "__main__":
    main()
