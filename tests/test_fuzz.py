"""Damaged model files end in one clear error or in a model, never in a crash or a hang."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from hwopt.errors import HwoptError, ModelError, UsageError
from hwopt.io.onnx import load
from tests.mutations import damage_bytes, damage_fields, seeds

SECONDS = 5  # for one damaged model of a kilobyte; it takes milliseconds


def attempts(folder: Path, first: int, count: int, damage: object) -> tuple[int, int]:
    """(loaded, refused); any other end fails the test and names the seed."""
    models, loaded, refused = seeds(), 0, 0
    path = folder / "damaged.onnx"
    (folder / "weights.bin").write_bytes(bytes(64))
    for seed in range(first, first + count):
        path.write_bytes(damage(models[seed % len(models)], np.random.default_rng(seed)))  # type: ignore[operator]
        started = time.perf_counter()
        try:
            load(path)
            loaded += 1
        except (ModelError, UsageError) as error:
            assert str(error), f"seed {seed}"
            refused += 1
        except HwoptError as error:
            pytest.fail(f"seed {seed}: the model's fault is reported as hwopt's: {error}")
        except Exception as error:
            pytest.fail(f"seed {seed}: {type(error).__name__}: {error}")
        assert time.perf_counter() - started < SECONDS, f"seed {seed}"
    return loaded, refused


def test_damaged_bytes(tmp_path: Path) -> None:
    loaded, refused = attempts(tmp_path, 0, 300, damage_bytes)
    assert refused > 150
    assert loaded + refused == 300


def test_damaged_fields(tmp_path: Path) -> None:
    loaded, refused = attempts(tmp_path, 1000, 500, damage_fields)
    assert loaded > 50  # the damage is not all fatal: later stages are reached
    assert refused > 200


def test_undamaged_seeds_load(tmp_path: Path) -> None:
    for model in seeds():
        assert load(model).nodes
