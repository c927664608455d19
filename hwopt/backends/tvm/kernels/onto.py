"""The epilogue of products that are added to what earlier products left in memory."""

from __future__ import annotations

from collections.abc import Sequence

from hwopt.backends.tvm.kernels import modular
from hwopt.backends.tvm.kernels.code import Code, Value, load
from hwopt.backends.tvm.kernels.epilogue import Epilogue, Place
from hwopt.target import MicroKernel


class Onto(Epilogue):
    """The sum with the element of `sums` that the result replaces; integers modulo 2^32."""

    def __init__(self, sums: Value, channels: int, size: int, micro: MicroKernel) -> None:
        super().__init__((), micro.accumulator, micro.accumulator, channels, 1, size, False, micro)
        self.sums = sums

    def apply(self, code: Code, value: Value, place: Place, shared: Sequence[Value], lanes: int, biased: bool) -> Value:
        value = super().apply(code, value, place, shared, lanes, biased)
        before = load(self.sums, place.flat, lanes)
        return modular.add(value, before, lanes) if self.accumulator == "int32" else value + before
