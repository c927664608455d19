"""Prices from tables of measured kernels: of this processor, of one like it, or those that ship for an instruction set."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from hwopt.backends.tvm.learn.local import Local
from hwopt.backends.tvm.learn.model import Learned
from hwopt.backends.tvm.learn.table import find_measured, find_table, instructions_of, load_table, user_folder
from hwopt.target import CostModel, MicroKernel

SHIPPED = Path(__file__).with_name("data")


def learned(analytical: CostModel, micros: Mapping[str, MicroKernel], llvm: Mapping[str, object], hertz: float) -> CostModel:
    """Of this processor: the user's own table (hwopt profile writes it), then the shipped one; else prices that are corrected by
    what is measured while planning: a relative's, or the analytical model's.

    `hertz` is the clock that the target's peaks are stated at.
    """
    path = find_table(llvm, user_folder(), SHIPPED)
    if path is not None:
        return Learned(path, analytical, micros, hertz=hertz)
    path, shared = related(micros, SHIPPED)
    relative = None if path is None else Learned(path, analytical, micros, hertz=hertz)
    return Local(analytical, relative, shared, hertz)


def related(micros: Mapping[str, MicroKernel], folder: Path) -> tuple[Path | None, frozenset[str]]:
    """The table whose processor multiplies most dtypes, floats among them, with this one's instructions; and which those are."""
    own = instructions_of(micros).items()
    best: tuple[Path | None, frozenset[str]] = (None, frozenset())
    for path in sorted(folder.glob("cpu_*.json")):
        shared = frozenset(dict(own & load_table(path).facts.get("instructions", {}).items()))
        if "float32" in shared and len(shared) > len(best[1]):
            best = (path, shared)
    return best


def shipped(analytical: CostModel, micros: Mapping[str, MicroKernel], llvm: Mapping[str, object], hertz: float) -> CostModel:
    """The shipped table for exactly these instructions, whoever asks; of several the first by name, else the analytical model.

    A target with a name of its own is priced alike on every machine that builds: the same inputs, the same decisions.
    """
    path = find_measured(llvm, SHIPPED)
    return analytical if path is None else Learned(path, analytical, micros, hertz=hertz)
