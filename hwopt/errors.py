"""Every error that a user can cause, how it prints, and the exit code it ends with."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping


class HwoptError(Exception):
    """A message for the user: `place: what is wrong; next step`. The command line prints it without a traceback."""

    exit_code = 1

    def __init__(self, message: str, *, place: str = "", hint: str = "") -> None:
        self.message, self.place, self.hint = message, place, hint
        super().__init__(message)

    def __str__(self) -> str:
        head = f"{self.place}: {self.message}" if self.place else self.message
        return f"{head}; {self.hint}" if self.hint else head


class UsageError(HwoptError):
    """A wrong option, name or combination on the command line or in a call."""

    exit_code = 2


class ModelError(HwoptError):
    """The model file is missing, damaged, or means nothing (bad shapes, NaN weights)."""

    exit_code = 3


class UnsupportedError(ModelError):
    """The model is fine but hwopt, or the backend, cannot compile a part of it; every such node is listed."""

    exit_code = 4


class DataError(HwoptError):
    """Calibration or evaluation data do not fit the model."""

    exit_code = 5


class VerifyError(HwoptError):
    """A Graph breaks a rule of the IR: an error in a pass or in hwopt, never in the user's model."""

    exit_code = 10


class PassError(HwoptError):
    """A pass cannot do what it was asked to, or failed while doing it."""

    exit_code = 10


class ToolchainError(HwoptError):
    """A compiler, a linker or a device is missing or failed."""

    exit_code = 6


class DeviceError(HwoptError):
    """A device cannot be reached, refuses, or stays away for too long."""

    exit_code = 7


class ArtifactError(HwoptError):
    """An artifact is damaged, foreign to this machine, or not an artifact."""

    exit_code = 8


class BudgetError(HwoptError):
    """No plan meets the budget; the message states the nearest one that does."""

    exit_code = 9


EXIT_CODES: Mapping[int, str] = {
    0: "done",
    1: "something else failed, such as writing a file (hwopt diff: the models differ)",
    UsageError.exit_code: "a wrong option, name or combination",
    ModelError.exit_code: "the model is missing, damaged or means nothing",
    UnsupportedError.exit_code: "a part of the model, or the target, cannot be compiled",
    DataError.exit_code: "calibration or evaluation data are missing or do not fit the model",
    ToolchainError.exit_code: "the build failed: a compiler, a linker or a tool is missing or refuses",
    DeviceError.exit_code: "a device cannot be reached, refuses, or stays away",
    ArtifactError.exit_code: "the artifact is damaged, no artifact, or for another machine",
    BudgetError.exit_code: "no plan meets the budget",
    PassError.exit_code: "a pass cannot do what it was asked to, or failed",
    130: "interrupted",
}

NEAR = 5  # names that a hint lists of a graph's many


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The hint for an unknown name: the nearest known one, or all of them when none is near."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    if near:
        return f"did you mean {near[0]}?"
    return "known: " + ", ".join(names) if names else "none is known"


def closest(name: str, known: Iterable[str], otherwise: str) -> str:
    """The same for one of many names: at most five that resemble it, or `otherwise`."""
    near = difflib.get_close_matches(name, sorted(known), n=NEAR, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else otherwise
