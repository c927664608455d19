"""Kernel templates in TIR: one entry for every operator family, whatever the target's micro-kernels are.

pack(spec, weights, micro)                -> the weights as the kernel reads them, one-dimensional
default_schedule(spec, micro, cores)      -> a JSON-able Schedule
build(spec, schedule, micro, symbol)      -> PrimFunc(data, weights, *epilogue tensors, out), flat buffers; pools have no weights
supports(spec, micro)                     -> "" or why there is no kernel
"""

from __future__ import annotations

from typing import Any

import numpy as np

from hwopt.backends.tvm.kernels import (
    amx,
    amx_layout,
    amx_schedule,
    array,
    conv_transpose,
    depthwise,
    gemm,
    packed,
    pool,
    pooled,
    schedule,
    winograd,
    winograd_schedule,
)
from hwopt.backends.tvm.kernels.geometry import geometry
from hwopt.backends.tvm.kernels.loops import LoopsSpec, build_loops, default_loops
from hwopt.backends.tvm.kernels.packed import PackedSpec
from hwopt.backends.tvm.kernels.schedule import Schedule
from hwopt.backends.tvm.kernels.spec import ConvSpec, ConvTransposeSpec, MatmulSpec, PoolSpec
from hwopt.backends.tvm.kernels.winograd_schedule import WinogradSpec
from hwopt.target import MicroKernel

__all__ = ["Schedule", "build", "default_schedule", "pack", "suited", "supports"]

Spec = ConvSpec | ConvTransposeSpec | MatmulSpec | PoolSpec | LoopsSpec | PackedSpec


def supports(spec: Spec, micro: MicroKernel) -> str:
    """The reason why the templates have no kernel for `spec` on `micro`, or ""."""
    if isinstance(spec, PoolSpec | LoopsSpec):
        return ""
    if isinstance(spec, PackedSpec):
        return packed.supports(spec, micro)
    if spec.accumulator != micro.accumulator:
        return f"the micro-kernel accumulates {micro.accumulator}, the operator {spec.accumulator}"
    widened = spec.data_dtype == "bfloat16" and depthwise.is_depthwise(spec)
    if spec.data_dtype != micro.activation and not (widened and micro.activation == "float32"):
        return f"the micro-kernel takes {micro.activation} data, not {spec.data_dtype}"
    if spec.weight_dtype != micro.dtype:
        return f"the micro-kernel takes {micro.dtype} weights, not {spec.weight_dtype}"
    if micro.narrow and (getattr(spec, "narrow", 0) < micro.narrow or depthwise.is_depthwise(spec)):
        return "the micro-kernel adds pairs of products in 16 bits, which large weights overflow"
    if micro.rows > 1 and (depthwise.is_depthwise(spec) or _single(spec)):
        return f"the micro-kernel multiplies {micro.rows} output positions that share their weights"
    if array.is_array(micro):
        return _kept(spec)
    if reason := pooled.reason_against(spec):
        return reason
    return _tiles(spec, micro) if amx_schedule.is_tile(micro) else ""


def _kept(spec: ConvSpec | ConvTransposeSpec | MatmulSpec) -> str:
    """Why a weight-stationary array should not compute `spec`, or ""."""
    if isinstance(spec, ConvTransposeSpec) or (isinstance(spec, MatmulSpec) and not spec.constant):
        return "the array takes constant weights of convolutions and matmuls"
    if geometry(spec).pooled:
        return "the array writes all of its results"
    return "a depthwise layer would use one column of the array" if depthwise.is_depthwise(spec) else ""


def suited(spec: Spec, micro: MicroKernel) -> MicroKernel:
    """The micro-kernel itself, or the first of its `others`, that takes `spec`; itself where none does."""
    return next((one for one in (micro, *micro.others) if not supports(spec, one)), micro)


def _tiles(spec: ConvSpec | ConvTransposeSpec | MatmulSpec, micro: MicroKernel) -> str:
    """Why a matrix unit should not compute `spec`, or ""."""
    if isinstance(spec, ConvTransposeSpec):
        return "tiles take convolutions and matmuls"
    if isinstance(spec, MatmulSpec) and spec.beside:
        return "tiles take products that lie one behind the other"
    if geometry(spec).pooled:
        return "tiles write all of their results"
    return amx_schedule.reason_for_vectors(geometry(spec), micro)


def _single(spec: ConvSpec | ConvTransposeSpec | MatmulSpec) -> bool:
    shape = geometry(spec)
    return shape.rows * shape.columns == 1


def pack(spec: ConvSpec | ConvTransposeSpec | MatmulSpec, weights: np.ndarray, micro: MicroKernel) -> np.ndarray:
    """Weights in ONNX's layout ([out, in / groups, height, width] or [k, n]) as the kernel reads them."""
    if isinstance(spec, ConvTransposeSpec):
        return conv_transpose.pack(spec, weights, micro)
    if isinstance(spec, WinogradSpec):
        return winograd.pack(spec, weights, micro)
    if depthwise.is_depthwise(spec):
        return depthwise.pack(spec, weights, micro)
    rows = weights.transpose(0, 2, 3, 1) if isinstance(spec, ConvSpec) else weights.T
    layout = amx_layout if amx_schedule.is_tile(micro) else gemm
    return layout.pack(geometry(spec), rows, micro)


def default_schedule(spec: Spec, micro: MicroKernel, cores: int = 1) -> Schedule:
    """Blocking from a small analytical model."""
    if isinstance(spec, LoopsSpec):
        return default_loops(cores)
    if isinstance(spec, PackedSpec):
        return packed.schedule_of(spec, micro, cores)
    if isinstance(spec, PoolSpec):
        return pool.default_schedule(spec, micro, cores)
    if isinstance(spec, WinogradSpec):
        return winograd_schedule.default_schedule(spec, micro, cores)
    if depthwise.is_depthwise(spec):
        return depthwise.default_schedule(spec, micro, cores)
    if array.is_array(micro):
        return array.default_schedule(geometry(spec), micro)
    model = amx_schedule if amx_schedule.is_tile(micro) else schedule
    return model.default_schedule(geometry(spec), micro, cores)


def build(spec: Spec, schedule: Schedule, micro: MicroKernel, symbol: str) -> Any:
    """The kernel as a tirx.PrimFunc."""
    if isinstance(spec, LoopsSpec):
        return build_loops(spec, schedule, symbol)
    if isinstance(spec, PackedSpec):
        return packed.build(spec, schedule, micro, symbol)
    if isinstance(spec, PoolSpec):
        return pool.Pool(spec, schedule, micro).build(symbol)
    if isinstance(spec, WinogradSpec):
        return winograd.Winograd(spec, schedule, micro).build(symbol)
    if depthwise.is_depthwise(spec):
        return depthwise.Depthwise(spec, schedule, micro).build(symbol)
    if isinstance(spec, ConvTransposeSpec):
        return conv_transpose.ConvTranspose(spec, schedule, micro).build(symbol)
    if array.is_array(micro):
        return array.ArrayGemm(geometry(spec), schedule, micro).build(symbol)
    if amx_schedule.is_tile(micro):
        kernel: gemm.Gemm | amx.TileGemm = amx.TileGemm(geometry(spec), schedule, micro)
    else:
        kernel = gemm.Gemm(geometry(spec), schedule, micro)
    if isinstance(spec, MatmulSpec) and not spec.constant:
        return kernel.build_computed(spec, symbol)
    return kernel.build(symbol)
