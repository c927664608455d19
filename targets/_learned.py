"""Prices from tables of measured kernels: of the processor that this runs on, or those that ship for an instruction set."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from hwopt.backends.tvm.learn.model import Learned
from hwopt.backends.tvm.learn.table import find_measured, find_table, user_folder
from hwopt.target import CostModel, MicroKernel

SHIPPED = Path(__file__).with_name("data")


def learned(analytical: CostModel, micros: Mapping[str, MicroKernel], llvm: Mapping[str, object], hertz: float) -> CostModel:
    """Of this processor: the user's own table (hwopt profile writes it), then the shipped one, else the analytical model.

    `hertz` is the clock that the target's peaks are stated at.
    """
    path = find_table(llvm, user_folder(), SHIPPED)
    return analytical if path is None else Learned(path, analytical, micros, hertz=hertz)


def shipped(analytical: CostModel, micros: Mapping[str, MicroKernel], llvm: Mapping[str, object], hertz: float) -> CostModel:
    """The shipped table for exactly these instructions, whoever asks; of several the first by name, else the analytical model.

    A target with a name of its own is priced alike on every machine that builds: the same inputs, the same decisions.
    """
    path = find_measured(llvm, SHIPPED)
    return analytical if path is None else Learned(path, analytical, micros, hertz=hertz)
