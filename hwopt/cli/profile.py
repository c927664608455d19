"""The verb that measures this machine: profile."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from hwopt.cli.device import naming_device, take_device
from hwopt.cli.options import JSON, TARGET
from hwopt.cli.progress import ProfilingBar
from hwopt.errors import UsageError
from hwopt.target import HOST


@click.command()
@TARGET
@click.option("--time", "duration", metavar="90s|10m|1h", required=True, help="How long to measure.")
@click.option("--prepare", metavar="90s|10m|1h", help="Compile so long first; --time 0s: to time it later, when all is quiet.")
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True)
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    help="The table; where targets find it if not given. Of a device: my_board.toml.",
)
@click.option("--core", "cores", type=int, multiple=True, help="A processor to stay on; may be repeated.")
@naming_device
@JSON
def profile(
    target: str, duration: str, prepare: str | None, threads: int, out: Path | None, cores: tuple[int, ...], as_json: bool,
    **device: Any,
) -> None:  # fmt: skip
    """Measure kernels on this machine, where they tell most, and learn what others cost: plans get better prices.

    With --device, or --tracker and --key: measure a device and write a target file for it, with its table beside it, that
    --target takes. An interrupted call keeps what it has measured; the next one goes on from there.
    """
    from hwopt.profiling import profile_target, report_data, seconds_of

    ahead, address = seconds_of(prepare) if prepare else 0.0, take_device(device)
    seconds = seconds_of(duration, least=0.0 if ahead else 1e-9)
    if address is not None and (target != HOST or cores or prepare):
        hint = "leave out --target, --core and --prepare"
        raise UsageError("the device itself says what it is, and compiles nothing ahead", place="--device", hint=hint)
    if address is not None and (out is None or out.suffix != ".toml"):
        raise UsageError("a device's profile is a target file", place="--out", hint="write -o my_board.toml")
    with ProfilingBar() as watch:
        if address is None:
            path, state = profile_target(
                target, seconds, prepare=ahead, threads=threads, out=out, cores=cores, watch=watch
            )  # fmt: skip
        else:
            from hwopt.device.profile import profile_device

            path, state = profile_device(address, seconds, Path(str(out)), threads=threads, watch=watch)
    data = report_data(path, state)
    click.echo(json.dumps(data, indent=1) if as_json else data["summary"])
