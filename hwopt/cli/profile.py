"""The verb that measures this machine: profile."""

from __future__ import annotations

import json
from pathlib import Path

import click

from hwopt.cli.options import JSON, TARGET
from hwopt.cli.progress import ProfilingBar


@click.command()
@TARGET
@click.option("--time", "duration", metavar="90s|10m|1h", required=True, help="How long to measure.")
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True)
@click.option("-o", "--out", type=click.Path(path_type=Path), help="The table; where targets find it if not given.")
@click.option("--core", "cores", type=int, multiple=True, help="A processor to stay on; may be repeated.")
@JSON
def profile(target: str, duration: str, threads: int, out: Path | None, cores: tuple[int, ...], as_json: bool) -> None:
    """Measure kernels on this machine, where they tell most, and learn what others cost: plans get better prices.

    An interrupted call keeps what it has measured; the next one goes on from there.
    """
    from hwopt.profiling import profile_target, report_data, seconds_of

    with ProfilingBar() as watch:
        path, state = profile_target(target, seconds_of(duration), threads=threads, out=out, cores=cores, watch=watch)
    data = report_data(path, state)
    click.echo(json.dumps(data, indent=1) if as_json else data["summary"])
