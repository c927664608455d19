"""`python -m benchmarks.host_tables`: measure this machine's tables of kernels for targets/data: all its instructions, and AVX2.

Networks are compiled first, with all processors; then they are timed, which wants a machine where nothing else runs. The two may
be two calls: `--prepare 14m --time 0s` before, `--prepare 0s --time 8m` in the quiet hour. Measurements stay in the cache
(`hwopt/tables`): a later call adds to them while the kernels' code is the same. Tables are then written to targets/data.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import click

import targets
from benchmarks.zoo import cache
from hwopt.backends.tvm.learn.table import path_for
from hwopt.plugins import find_target
from hwopt.profiling import State, profile_target, progress_line, seconds_of


@dataclass(frozen=True)
class Share:
    """Of all the time, how much one target with one number of threads gets."""

    target: str
    threads: int
    part: float


SHIPPED = Path(str(targets.__file__)).with_name("data")
SHARES = (Share("host", 1, 0.45), Share("host", 2, 0.15), Share("x86-64-v3", 1, 0.4))


def shares() -> list[Share]:
    """Those of this machine: with AVX2 alone both targets have one table."""
    own = path_for(find_target("host"))
    found = [one for one in SHARES if one.target == "host" or path_for(find_target(one.target)) != own]
    whole = sum(one.part for one in found)
    return [dataclasses.replace(one, part=one.part / whole) for one in found]


@click.command()
@click.option("--prepare", default="14m", show_default=True, help="How long to compile, all tables together.")
@click.option("--time", "duration", default="8m", show_default=True, help="How long to time, all tables together.")
@click.option("--out", type=click.Path(path_type=Path), default=SHIPPED, show_default=True, help="Where the tables go.")
@click.option("--code", default="", help="A name for the templates' code, for changes that cost no time; else a digest of it.")
@click.option("--logs", type=click.Path(path_type=Path), default=None, help="Where measurements are kept.")
def main(prepare: str, duration: str, out: Path, code: str, logs: Path | None) -> None:
    """Compile all, then time all."""
    chosen, folder = shares(), logs or cache().parent / "tables"
    ahead, seconds = (seconds_of(text, least=0.0) for text in (prepare, duration))
    for one in chosen if ahead else ():
        _, state = profile_target(
            one.target, 0.0, prepare=one.part * ahead, threads=one.threads, out=_log(one, folder), code=code
        )
        _say(one, state)
    for one in chosen if seconds else ():
        log, part = _log(one, folder), one.part * seconds
        _, state = profile_target(one.target, part, threads=one.threads, out=log, more=False, table=False, code=code)
        _say(one, state)
    for one in chosen if seconds else ():  # all are timed: now the machine may be busy
        if one.threads == 1:
            path, state = profile_target(one.target, 1e-9, out=_log(one, folder), more=False, code=code)
            _say(one, state)
            out.mkdir(parents=True, exist_ok=True)
            found = path_for(find_target(one.target), out)
            found.write_bytes(path.read_bytes())
            click.echo(f"  {found}: {found.stat().st_size / 1e6:.1f} MB")


def _log(one: Share, folder: Path) -> Path:
    """All numbers of threads of a target are in one table."""
    return folder / path_for(find_target(one.target), folder).name


def _say(one: Share, state: State) -> None:
    click.echo(f"{one.target}, {one.threads} thread{'s' if one.threads > 1 else ''}: {progress_line(state)}")
    for failure in state.failures[:3]:
        click.echo(f"  {failure}")


if __name__ == "__main__":
    main()
