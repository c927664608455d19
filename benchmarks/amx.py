"""What a matrix unit (Intel AMX) can do at most: products of tiles that are loaded once, four accumulators in turn."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from hwopt.backends.tvm.build import object_code
from hwopt.backends.tvm.run import load_objects
from hwopt.target import MicroKernel, Target

STEPS = 100_000
ACROSS = 2  # x 2 accumulators, as many as the templates use by default
TILE = 1024  # bytes


def loop(micro: MicroKernel, target: Target) -> Callable[[], float]:
    """The loop, compiled: a call runs it once and returns its seconds."""
    import tvm

    library: Any = load_objects((object_code({"peak": peak_kernel(micro)}, target.tvm, target.name),))
    arguments = [tvm.runtime.tensor(np.zeros(size, np.uint8)) for size in (2 * ACROSS * TILE, ACROSS * ACROSS * TILE)]

    def run() -> float:
        started = time.perf_counter()
        library["peak"](*arguments)
        return time.perf_counter() - started

    return run


def operations(micro: MicroKernel) -> float:
    """Of one run of the loop, 2 per multiply-add."""
    return 2.0 * micro.rows * micro.lanes * micro.depth * ACROSS * ACROSS * STEPS


def peak_kernel(micro: MicroKernel, steps: int = STEPS) -> object:
    """PrimFunc(operands, accumulators): `steps` times every data tile x every weight tile."""
    from tvm import tirx

    from hwopt.backends.tvm.kernels.amx_instructions import address, number_of, stride, tile_instruction
    from hwopt.backends.tvm.kernels.code import Code, Value, function

    operands = tirx.decl_buffer((2 * ACROSS * TILE,), "uint8", "operands")
    out = tirx.decl_buffer((ACROSS * ACROSS * TILE,), "uint8", "out")
    code, count = Code(), ACROSS * ACROSS
    config = code.alloc("config", 64, "uint8")
    for at in range(64):  # palette 1; from 16 on the bytes of each tile's rows, from 48 on the rows
        wide = 16 <= at < 32 and at % 2 == 0
        code.store(config, at, tirx.const(1 if at == 0 else 64 if wide else 16 if 48 <= at < 56 else 0, "uint8"))
    tile_instruction(code, "ldtilecfg", address(config, 0))
    for tile in range(count):
        tile_instruction(code, "tileloadd64", number_of(tile), address(out, tile * TILE), stride(64))
    for tile in range(2 * ACROSS):
        tile_instruction(code, "tileloadd64", number_of(count + tile), address(operands, tile * TILE), stride(64))

    def step(inner: Code, _: Value) -> None:
        for tile in range(count):
            data, weights = count + tile // ACROSS, count + ACROSS + tile % ACROSS
            name = micro.intrinsic.removeprefix("llvm.x86.")
            tile_instruction(inner, name, *map(number_of, (tile, data, weights)))

    code.loop("step", steps, step)
    for tile in range(count):
        tile_instruction(code, "tilestored64", number_of(tile), address(out, tile * TILE), stride(64))
    tile_instruction(code, "tilerelease")
    return function("peak", [operands, out], code)
