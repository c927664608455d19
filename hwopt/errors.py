"""Every error that a user can cause, how it prints, and the exit code it ends with."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


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


class UnsupportedError(ModelError):
    """The model is fine but hwopt, or the backend, cannot compile a part of it; every such node is listed."""


class DataError(HwoptError):
    """Calibration or evaluation data do not fit the model."""


class VerifyError(HwoptError):
    """A Graph breaks a rule of the IR: an error in a pass or in hwopt, never in the user's model."""


class PassError(HwoptError):
    """A pass cannot do what it was asked to, or failed while doing it."""


class ToolchainError(HwoptError):
    """A compiler, a linker or a device is missing or failed."""


class DeviceError(HwoptError):
    """A device cannot be reached, refuses, or stays away for too long."""


class ArtifactError(HwoptError):
    """An artifact is damaged, foreign to this machine, or not an artifact."""


class BudgetError(HwoptError):
    """No plan meets the budget; the message states the nearest one that does."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The hint for an unknown name: the nearest known one, or all of them when none is near."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    if near:
        return f"did you mean {near[0]}?"
    return "known: " + ", ".join(names) if names else "none is known"
