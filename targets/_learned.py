"""Prices of the processor that this runs on, from a table that was measured on it where there is one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from hwopt.backends.tvm.learn.model import Learned
from hwopt.backends.tvm.learn.table import find_table, user_folder
from hwopt.target import CostModel, MicroKernel

SHIPPED = Path(__file__).with_name("data")


def learned(analytical: CostModel, micros: Mapping[str, MicroKernel], llvm: Mapping[str, object]) -> CostModel:
    """The user's own table first (hwopt profile writes it), then the shipped one, else the analytical model."""
    path = find_table(llvm, user_folder(), SHIPPED)
    return analytical if path is None else Learned(path, analytical, micros)
