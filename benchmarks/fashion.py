"""Fashion-MNIST (Xiao, Rasul and Vollgraf 2017, MIT) as Debian's dataset-fashion-mnist installs it."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np


def read_idx(path: Path) -> np.ndarray:
    """Read one gzipped IDX file (the MNIST container): images as [n, 28, 28] uint8, labels as [n] uint8."""
    raw = gzip.decompress(path.read_bytes())
    rank = raw[3]
    shape = [int.from_bytes(raw[4 + 4 * axis : 8 + 4 * axis], "big") for axis in range(rank)]
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(shape)


def dataset(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of `part`, which is `train` (60,000) or `t10k` (10,000)."""
    return read_idx(folder / f"{part}-images-idx3-ubyte.gz"), read_idx(folder / f"{part}-labels-idx1-ubyte.gz")
