"""Ctrl-C while a bar is shown."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from hwopt.cli.progress import ProgressBar, TuningBar
from hwopt.errors import UsageError


@pytest.fixture(autouse=True)
def python_handles_the_signal() -> Iterator[None]:
    """As in a terminal; tests may run in the background, where shells have it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def press() -> None:
    """What C++ code does that loses the exception of a callback."""
    with contextlib.suppress(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_an_interrupt_that_was_swallowed_is_raised_by_the_next_step() -> None:
    with pytest.raises(KeyboardInterrupt), ProgressBar() as advance:
        advance("compiling", 0, 1)
        press()
        advance("measuring", 0, 1)


def test_work_that_says_that_it_was_interrupted_goes_on() -> None:
    with ProgressBar() as advance:
        press()
        advance("interrupted: the best plan of 3 rounds", 0, 1)
        advance("compiling", 0, 1)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_that_became_another_error_is_an_interrupt() -> None:
    with pytest.raises(KeyboardInterrupt), ProgressBar():
        press()
        raise UsageError("TVM cannot compile it")


def test_an_ignored_signal_stays_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with ProgressBar() as advance:
        os.kill(os.getpid(), signal.SIGINT)
        advance("compiling", 0, 1)


@pytest.mark.parametrize(("trials", "said"), [(0, "nothing new was measured yet"), (8, "what was measured is kept")])
def test_an_interrupted_search_says_what_is_kept(trials: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    state = SimpleNamespace(
        trials=trials, share=0.5, before=1.0, after=0.9, limit=0.5, elapsed=1.0, effort=SimpleNamespace(seconds=2.0, trials=None)
    )
    with pytest.raises(KeyboardInterrupt), TuningBar() as watch:
        watch(state)
        press()
        watch(state)
    assert said in capsys.readouterr().err


def test_what_is_kept_is_said_where_the_interrupt_became_another_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyboardInterrupt), TuningBar():
        press()
        raise RuntimeError("an exception that a library made of it")
    assert "nothing new was measured yet" in capsys.readouterr().err
