"""`python -m benchmarks.run SUITE [--json FILE]`: every number that the README claims, measured again."""

from __future__ import annotations

import importlib
import inspect
import json
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from hwopt.errors import HwoptError

# and the module that has it
SUITES = {
    "demo": "demo",
    "tuning": "tuning",
    "models": "models",
    "kernels": "kernels",
    "accuracy": "accuracy",
    "fidelity": "fidelity",
    "fidelity-host": "host_kernels",
    "levels": "levels",
    "weights": "weights",
    "planner": "planner",
    "transfer": "transfer",
    "sensitivity": "sensitivity",
    "overhead": "overhead",
}


@click.command()
@click.argument("suite", type=click.Choice(list(SUITES)))
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write the result here.")
@click.option("--threads", type=click.IntRange(1), default=None)
@click.option("--models", default=None, help="Only these models, or parts of the suite, joined by commas.")
@click.option("--batches", default=None, help="Batch sizes, joined by commas.")
@click.option("--dtypes", default=None, help="Precisions, joined by commas: f32, int8.")
@click.option("--quick", is_flag=True, default=None, help="Few turns, and the smallest sizes only.")
@click.option("--tune", default=None, help="Also with schedules tuned so long for each model, precision and threads: 5m.")
@click.option("--plot", type=click.Path(path_type=Path), default=None, help="Draw the ratios into this PNG file.")
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    default=None,
    help="ImageNet pictures named by their class, or Fashion-MNIST.",
)
def main(suite: str, file: Path | None, **options: object) -> None:
    """Measure one SUITE on this machine."""
    work = importlib.import_module(f"benchmarks.{SUITES[suite]}").run
    given = {name: value for name, value in options.items() if value is not None}
    for name in given:
        if name not in inspect.signature(work).parameters:
            raise click.UsageError(f"suite {suite} has no option --{name}")
    try:
        found = work(**given)
    except HwoptError as error:
        raise click.ClickException(str(error)) from error
    if file is not None:
        file.write_text(json.dumps(found, indent=1) + "\n")
    table = Table("case", "metric", "unit", "ours", "peers", "ratio", box=None)
    for row in found["rows"]:
        peers = ", ".join(f"{name} {value:.4g}" for name, value in row["peers"].items())
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.3f}"
        table.add_row(row["case"], row["metric"], row["unit"], f"{row['ours']:.4g}", peers, ratio)
    Console(width=140).print(table)
    for note in found.get("notes", ()):
        Console(width=140).print(note, markup=False)
    Console().print_json(json.dumps(found["summary"]))


if __name__ == "__main__":
    main()
