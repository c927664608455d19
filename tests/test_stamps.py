"""A program as a library that times itself: the whole run, its kernels from a bare loop, and each of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.overhead import by_stamps, taken
from hwopt.emit.stamps import Stamped, build_stamped
from tests._emit import KERNEL, ramp
from tests._kernels import program

tvm = pytest.importorskip("tvm")


def loaded(folder: Path, *calls: tuple[str, ...]) -> tuple[Stamped, Any, tuple[Any, ...]]:
    """The library, and tensors: a ramp, and room for the result."""
    made = build_stamped(program(*calls), folder / "m")
    return made, tvm.runtime.load_module(str(made.path)), (tvm.runtime.tensor(ramp()), tvm.runtime.tensor(ramp() * 0))


@pytest.mark.parametrize("function", ["run", "kernels"])
def test_the_timed_run_and_the_timed_kernels_compute_the_model(function: str, tmp_path: Path) -> None:
    _, library, tensors = loaded(tmp_path, ("scratch", "x", "t"), ("add", "t", "x", "y"))
    assert library[f"hwopt_stamp_{function}"](5, 1, *tensors) > 0
    np.testing.assert_array_equal(tensors[1].numpy(), 3 * ramp() + 2)


def test_every_call_of_every_pass_is_timed_and_the_clock_beside_it(tmp_path: Path) -> None:
    made, library, tensors = loaded(tmp_path, ("double", "x", "t"), ("add", "t", "x", "y"))
    table = tvm.runtime.tensor(np.zeros((3, made.calls + 1)))
    assert library["hwopt_stamp_calls"](3, 1, *tensors, table) == 0
    assert table.shape == (3, 3) and (table.numpy() > 0).all()


def test_a_kernel_that_fails_is_no_time(tmp_path: Path) -> None:
    _, library, tensors = loaded(tmp_path, ("double", "x", "t"), ("fail", "t", "y"))
    assert library["hwopt_stamp_kernels"](1, 1, *tensors) == -1
    assert library["hwopt_stamp_run"](1, 1, *tensors) == KERNEL - 100


def test_the_drivers_part_is_what_a_run_takes_beyond_its_kernels(tmp_path: Path) -> None:
    """The suite's figures from clocks of the test's own."""
    made, library, tensors = loaded(tmp_path, ("double", "x", "y"))
    times = taken({"run": lambda _: 1.25e-3, "kernels": lambda _: 1e-3}, 3)
    np.testing.assert_allclose(times["run"] / times["kernels"] - 1, [0.25] * 3)
    assert by_stamps(made, library, tensors, 1, 1.0) > 0
