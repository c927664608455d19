"""Transposed convolution: the phases of `phases` as implicit GEMMs that share the input, its padding and the output.

A task takes a block of rows of every phase: it copies the input rows under them once, then runs phase after phase.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from tvm import tirx

from hwopt.backends.tvm.kernels import gemm
from hwopt.backends.tvm.kernels.code import Code, Value, function
from hwopt.backends.tvm.kernels.epilogue import Epilogue
from hwopt.backends.tvm.kernels.geometry import geometry, of_phase
from hwopt.backends.tvm.kernels.micro import fused_multiply_add
from hwopt.backends.tvm.kernels.phases import AxisPhase, frame, phases
from hwopt.backends.tvm.kernels.schedule import Schedule
from hwopt.backends.tvm.kernels.schedule import default_schedule as gemm_schedule
from hwopt.backends.tvm.kernels.spec import Bias, ConvTransposeSpec, Step
from hwopt.backends.tvm.kernels.tile import Source, Work
from hwopt.target import MicroKernel


def pack(spec: ConvTransposeSpec, weights: np.ndarray, micro: MicroKernel) -> np.ndarray:
    """[groups * k, n, height, width] -> the packed weights of every phase, one after the other."""
    depth = spec.in_channels // spec.groups
    rows = weights.reshape(spec.groups, depth, -1, *spec.kernel).transpose(0, 2, 3, 4, 1)
    return np.concatenate(
        [gemm.pack(of_phase(spec, *phase), _taken(_taken(rows, phase[0], 2), phase[1], 3), micro) for phase in phases(spec)]
    )


def _taken(rows: np.ndarray, phase: AxisPhase, axis: int) -> np.ndarray:
    """The taps of a phase; one of zeros where it has none."""
    return rows.take(phase.taps, axis) if phase.taps else np.zeros_like(rows.take([0], axis))


def tap_sums(spec: ConvTransposeSpec, weights: np.ndarray) -> np.ndarray:
    """[phases, channels]: the sums of the int8 weights that meet the data in each phase, for the zero points' correction."""
    depth = spec.in_channels // spec.groups
    rows = weights.astype(np.int64).reshape(spec.groups, depth, -1, *spec.kernel).sum(1)
    sums = [_taken(_taken(rows, down, 2), across, 3).sum((2, 3)).reshape(-1) for down, across in phases(spec)]
    return np.stack(sums)


def default_schedule(spec: ConvTransposeSpec, micro: MicroKernel, cores: int = 1) -> Schedule:
    """The largest phase's; a task takes the same rows of all of them."""
    return gemm_schedule(geometry(spec), micro, cores)


class PhaseEpilogue(Epilogue):
    """An epilogue whose biases have a row for each phase."""

    def __init__(self, phases: int, *details: Any) -> None:
        self.phases = phases
        super().__init__(*details)

    def _tensor(self, step: Step, index: int) -> Value:
        if isinstance(step, Bias):
            return tirx.decl_buffer((self.phases * self.channels,), self.accumulator, "bias")
        return super()._tensor(step, index)

    def of(self, phase: int) -> PhaseEpilogue:
        """The same, with the tensors shared, for one phase."""
        twin = copy.copy(self)
        twin.bias_row = phase * self.channels
        return twin


class ConvTranspose:
    """One kernel under construction."""

    def __init__(self, spec: ConvTransposeSpec, schedule: Schedule, micro: MicroKernel) -> None:
        down, across, found = frame(spec, 0), frame(spec, 1), phases(spec)
        self.spec, self.micro = spec, micro
        self.schedule = dataclasses.replace(schedule, block_columns=across.count)
        self.window = dataclasses.replace(
            of_phase(spec, *found[0]), rows=down.count, columns=across.count, taps=(down.highest - down.lowest + 1, 1),
            dilations=(1, 1), pads=(-down.lowest, across.before, max(0, down.after), across.after),
        )  # fmt: skip
        size = spec.batch * spec.out_height * spec.out_width * spec.out_channels
        self.data = tirx.decl_buffer((spec.batch * spec.height * spec.width * spec.in_channels,), spec.data_dtype, "data")
        self.out = tirx.decl_buffer((size,), spec.out_dtype, "out")
        self.epilogue = PhaseEpilogue(
            len(found), spec.epilogue, spec.accumulator, spec.out_dtype, spec.out_channels, spec.batch, size,
            fused_multiply_add(micro),
        )  # fmt: skip
        self.phases = [Phase(self, index, *phase) for index, phase in enumerate(found)]

    def build(self, symbol: str) -> tirx.PrimFunc:
        """PrimFunc(data, packed weights, *epilogue tensors, out)."""
        sizes = [gemm.packed_size(phase.shape, self.micro) for phase in self.phases]
        weights = tirx.decl_buffer((sum(sizes),), self.spec.weight_dtype, "weights")
        vectors = self.window.vectors(self.micro.lanes)
        code = Code()

        def task(inner: Code, number: Value) -> None:
            image, row, _, tile = self.schedule.place(number, self.window, vectors)
            source = self._source(inner, image, row)
            for index, phase in enumerate(self.phases):
                phase.emit(inner, (image, row, tile), source, (weights, sum(sizes[:index])))

        code.loop("task", self.schedule.tasks(self.window, vectors), task, parallel=self.schedule.parallel)
        return function(symbol, [self.data, weights, *self.epilogue.parameters, self.out], code)

    def _source(self, code: Code, image: Value, row: Value) -> Source:
        """The data of all phases: `at` is the input position `lowest` rows and `before` columns from an output position's."""
        whole = gemm.Gemm(self.window, self.schedule, self.micro)
        whole.data = self.data
        if any(self.phases[0].shape.pads):
            return whole.padded(code, image, row)
        source = whole.direct(image)
        lowest = frame(self.spec, 0).lowest
        return dataclasses.replace(source, at=lambda y, x: source.at(y + lowest, x))


class Phase(gemm.Gemm):
    """The GEMM of one phase, in the buffers of the whole."""

    def __init__(self, whole: ConvTranspose, index: int, down: AxisPhase, across: AxisPhase) -> None:
        super().__init__(of_phase(whole.spec, down, across), whole.schedule, whole.micro)
        self.whole, self.down, self.across = whole, down, across
        self.data, self.out, self.epilogue = whole.data, whole.out, whole.epilogue.of(index)

    def position(self, image: Value, row: Value, column: Value) -> Value:
        spec = self.whole.spec
        y = row * spec.strides[0] + self.down.offset
        return (image * spec.out_height + y) * spec.out_width + column * spec.strides[1] + self.across.offset

    def emit(self, code: Code, block: Sequence[Value], source: Source, weights: tuple[Value, int]) -> None:
        """Its part of the block that starts at `block`: image, row, channel tile."""
        image, row, tile = block
        rows, columns = frame(self.whole.spec, 0), frame(self.whole.spec, 1)
        away = (self.down.start - rows.lowest) * source.row_stride
        away += (self.across.start + columns.before) * self.shape.channels
        here = dataclasses.replace(source, at=lambda y, x: source.at(y, x) + away)

        def of_group(inner: Code, group: Value) -> None:
            offset = weights[1] + group * self.vectors * self.panel
            self.channel_tiles(inner, Work(self, image, group, row, 0, here, weights[0], offset), tile)

        one_block = self.schedule.block_rows >= rows.count
        inside = True if one_block else tirx.LT(row, self.shape.rows)
        code.when(inside, lambda some: some.loop("group", self.shape.groups, of_group))
