"""How long work shows itself to a person."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click
import rich.progress


class ProgressBar:
    """A progress bar on a terminal's stderr; elsewhere one line per stage."""

    def __enter__(self) -> Callable[..., None]:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn

        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bar = rich.progress.Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task("")
        self._stage = ""
        self._bar.start()
        return self._advance

    def _advance(self, stage: str, done: int, total: int) -> None:
        if self._bar.disable and stage != self._stage:
            click.echo(f"hwopt: {stage} ...", err=True)
        self._stage = stage
        self._bar.update(self._task, description=stage, completed=done, total=total)

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


class TuningBar(ProgressBar):
    """The bar of a search: the best time so far, its share of the limit, what remains; an interrupt says what is kept."""

    def _advance_search(self, state: Any) -> None:
        from hwopt.tuning import progress_line

        text = progress_line(state)
        if self._bar.disable:
            click.echo(f"hwopt: {text}", err=True)
        self._bar.update(self._task, description=text, completed=int(100 * state.share), total=100)

    def __enter__(self) -> Callable[..., None]:
        super().__enter__()
        return self._advance_search

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        if error and error[0] is KeyboardInterrupt:
            click.echo("hwopt: what was measured is kept; run the same command to go on", err=True)


class ProfilingBar(ProgressBar):
    """The bar of `hwopt profile`: what was measured, how well others are predicted; an interrupt says what is kept."""

    _told = -1

    def _advance_profile(self, state: Any) -> None:
        from hwopt.profiling import progress_line

        text = progress_line(state)
        if self._bar.disable and len(state.records) // 200 != self._told:
            click.echo(f"hwopt: {text}", err=True)
            self._told = len(state.records) // 200
        self._bar.update(self._task, description=text, completed=int(100 * state.share), total=100)

    def __enter__(self) -> Callable[..., None]:
        super().__enter__()
        return self._advance_profile

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        if error and error[0] is KeyboardInterrupt:
            click.echo("hwopt: what was measured is kept; run the same command to go on", err=True)
