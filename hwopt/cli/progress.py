"""How long work shows itself to a person."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import Any

import click
import rich.progress


class ProgressBar:
    """A progress bar on a terminal's stderr; elsewhere one line per stage.

    A Ctrl-C that C++ code swallows (a KeyboardInterrupt inside of one of its callbacks is lost, or becomes another error) is
    raised again by the next step, until a stage says that the work was interrupted.
    """

    _pressed = False

    def __enter__(self) -> Callable[..., None]:
        self._before = signal.getsignal(signal.SIGINT)
        if self._ours:
            signal.signal(signal.SIGINT, self._press)
        return self._begin()

    @property
    def _ours(self) -> bool:
        """Not in other threads, nor where the shell has the signal ignored (a job in the background)."""
        return threading.current_thread() is threading.main_thread() and self._before not in (None, signal.SIG_IGN)

    def _press(self, *_: object) -> None:
        self._pressed = True
        raise KeyboardInterrupt

    def _check(self, stage: str) -> None:
        if stage.startswith("interrupted"):
            self._pressed = False
        if self._pressed:
            raise KeyboardInterrupt

    def _begin(self) -> Callable[..., None]:
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
        self._check(stage)
        if self._bar.disable and stage != self._stage:
            click.echo(f"hwopt: {stage} ...", err=True)
        self._stage = stage
        self._bar.update(self._task, description=stage, completed=done, total=total)

    def __exit__(self, *raised: object) -> None:
        self._bar.stop()
        if self._ours:
            signal.signal(signal.SIGINT, self._before)
        error = raised[1] if raised else None
        if self._pressed and isinstance(error, Exception):
            raise KeyboardInterrupt from error


class PausableBar(ProgressBar):
    """The bar of work that keeps what it has measured; a subclass says in one line what it has reached."""

    _kept = False

    def line(self, state: Any) -> str:
        """What has been reached, and what remains."""
        raise NotImplementedError

    def kept(self, state: Any) -> bool:
        """Whether an interrupt now leaves something behind."""
        raise NotImplementedError

    def news(self, _: Any) -> bool:
        """False for a state that is not worth a line of its own where there is no terminal."""
        return True

    def _begin(self) -> Callable[..., None]:
        super()._begin()
        return self._advance_state

    def _advance_state(self, state: Any) -> None:
        self._kept = self.kept(state)
        self._check("")
        text = self.line(state)
        if self._bar.disable and self.news(state):
            click.echo(f"hwopt: {text}", err=True)
        self._bar.update(self._task, description=text, completed=int(100 * state.share), total=100)

    def __exit__(self, *error: object) -> None:
        try:
            super().__exit__(*error)
        finally:  # it raises what the end of the work hid
            if error and (error[0] is KeyboardInterrupt or (self._pressed and error[0] is not None)):
                kept = "what was measured is kept; run the same command to go on"
                click.echo(f"hwopt: {kept if self._kept else 'nothing new was measured yet'}", err=True)


class TuningBar(PausableBar):
    """The bar of a search: the best time so far, its share of the limit, what remains."""

    def line(self, state: Any) -> str:
        from hwopt.tuning import progress_line

        return progress_line(state)

    def kept(self, state: Any) -> bool:
        return bool(state.trials)


class ProfilingBar(PausableBar):
    """The bar of `hwopt profile`: what was measured, how well others are predicted."""

    _told = -1

    def line(self, state: Any) -> str:
        from hwopt.profiling import progress_line

        return progress_line(state)

    def news(self, state: Any) -> bool:
        """Every two hundred kernels."""
        told, self._told = self._told, len(state.records) // 200
        return told != self._told

    def kept(self, state: Any) -> bool:
        return bool(state.records or state.waiting)
