"""The unit of tuning: one kernel of the templates, for one target and number of threads."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hwopt.backends.tvm import kernels
from hwopt.backends.tvm.kernels import Schedule
from hwopt.backends.tvm.kernels.amx_schedule import is_tile
from hwopt.backends.tvm.kernels.loops import LoopsSpec, Traced
from hwopt.backends.tvm.kernels.packed import PackedSpec
from hwopt.backends.tvm.kernels.spec import ConvSpec, ConvTransposeSpec, MatmulSpec, PoolSpec
from hwopt.ir import Graph
from hwopt.target import MicroKernel, Target

Spec = ConvSpec | ConvTransposeSpec | MatmulSpec | PoolSpec | LoopsSpec | PackedSpec


@dataclass(frozen=True)
class Task:
    """One kernel to tune; `tvm` is the TVM target as canonical JSON."""

    spec: Spec
    micro: MicroKernel
    tvm: str
    threads: int

    @functools.cached_property
    def workload(self) -> dict[str, Any]:
        """Everything that decides about the fastest schedule, as JSON data: the key of the database."""
        return {
            "spec": plain(self.spec), "micro": plain(self.micro), "target": json.loads(self.tvm), "threads": self.threads,
            "tvm": tvm_version(), "templates": templates_digest(),
        }  # fmt: skip

    @functools.cached_property
    def key(self) -> str:
        return hashlib.sha256(json.dumps(self.workload, sort_keys=True).encode()).hexdigest()[:24]

    @property
    def default(self) -> Schedule:
        return kernels.default_schedule(self.spec, self.micro, self.threads)

    @property
    def name(self) -> str:
        """conv 3x3/2 64>128 56x56, matmul 128x768x768 ..."""
        spec = self.spec
        if isinstance(spec, LoopsSpec):
            return f"{spec.name} of {spec.bytes} bytes"
        if isinstance(spec, PackedSpec):
            return f"matmul {spec.m}x{spec.k}x{spec.n} {spec.data_dtype}, codes of {spec.coding.bits} bits"
        if isinstance(spec, MatmulSpec):
            return f"matmul {spec.batch}x{spec.m}x{spec.k}x{spec.n} {spec.data_dtype}"
        kernel = "x".join(map(str, spec.kernel)) + (f"/{spec.strides[0]}" if spec.strides != (1, 1) else "")
        if isinstance(spec, PoolSpec):
            return f"{spec.function} pool {kernel} {spec.channels} {spec.height}x{spec.width} {spec.data_dtype}"
        if isinstance(spec, ConvTransposeSpec):
            return f"conv transpose {kernel} {spec.in_channels}>{spec.out_channels} {spec.height}x{spec.width} {spec.data_dtype}"
        what = "conv" if spec.groups == 1 else "depthwise" if spec.groups == spec.in_channels else f"conv/{spec.groups}"
        return f"{what} {kernel} {spec.in_channels}>{spec.out_channels} {spec.height}x{spec.width} {spec.data_dtype}"

    def limit(self, target: Target, peak: float) -> float:
        """Seconds that it takes at least, as far as we know: `peak` operations a second and core, the memory's bandwidth."""
        size = _bytes(self.spec)
        memory = next((one for one in target.memories if size <= one.bytes), target.memories[-1])
        return max(operations(self.spec) / (peak * self.threads), size / memory.bytes_per_second / self.threads)

    @property
    def probe(self) -> Task:
        """A product in the first level cache on one core: what its micro-kernel can do at best."""
        micro = self.micro
        if is_tile(micro):  # neighbouring positions share their data: a long run of products for few loads from memory
            spec: Spec = ConvSpec(
                1, 1, 32 * micro.rows + 19, micro.depth, 2 * micro.lanes, (1, 20), data_dtype=micro.activation,
                weight_dtype=micro.dtype, out_dtype=micro.accumulator,
            )  # fmt: skip
            return dataclasses.replace(self, spec=spec, threads=1)
        spec = MatmulSpec(
            1, 56, 4 * micro.lanes, 64 * micro.depth, data_dtype=micro.activation, weight_dtype=micro.dtype,
            out_dtype=micro.accumulator,
        )  # fmt: skip
        return dataclasses.replace(self, spec=spec, threads=1)


BYTES = {"float32": 4, "int32": 4, "bfloat16": 2}


def operations(spec: Spec) -> int:
    """Two for each multiply-add; pools have none."""
    return 0 if isinstance(spec, PoolSpec | LoopsSpec) else 2 * spec.macs


def _bytes(spec: Spec) -> int:
    """Read and written at least."""
    if isinstance(spec, LoopsSpec):
        return spec.bytes
    item, out_item = (BYTES.get(dtype, 1) for dtype in (spec.data_dtype, spec.out_dtype))
    if isinstance(spec, PackedSpec):
        scales = 4 * spec.n * spec.blocks * (2 if spec.zeros else 1)
        return spec.m * (spec.k * item + spec.n * out_item) + spec.n * spec.k * spec.coding.bits // 8 + scales
    if isinstance(spec, MatmulSpec):
        weights = spec.k * spec.n * (1 if spec.constant or spec.shared else spec.batch)
        return spec.batch * spec.m * (spec.k * item + spec.n * out_item) + weights * item
    outputs, inputs = spec.batch * spec.out_height * spec.out_width, spec.batch * spec.height * spec.width
    if isinstance(spec, PoolSpec):
        return spec.channels * (inputs * item + outputs * out_item)
    weights = spec.out_channels * spec.in_channels // spec.groups * spec.kernel[0] * spec.kernel[1]
    return inputs * spec.in_channels * item + outputs * spec.out_channels * out_item + weights * item


def plain(value: Any) -> Any:
    """A dataclass as JSON data, with the names of nested classes (an epilogue's steps)."""
    if dataclasses.is_dataclass(value):
        names = (one.name for one in dataclasses.fields(value) if one.metadata.get("plain", True))
        fields = {name: plain(getattr(value, name)) for name in names}
        return {"kind": type(value).__name__, **fields}
    return [plain(item) for item in value] if isinstance(value, tuple) else value


def schedule_from(data: Any) -> Schedule | None:
    """A schedule that `plain` wrote; None if its fields are not today's."""
    form = next((one for one in (Schedule, Traced) if isinstance(data, Mapping) and data.get("kind") == one.__name__), None)
    if form is None:
        return None
    kinds = {one.name: str if one.name == "trace" else int for one in dataclasses.fields(form)}
    if set(data) != {"kind", *kinds} or not all(isinstance(data[name], kind) for name, kind in kinds.items()):
        return None
    return form(**{name: data[name] for name in kinds})


@functools.cache
def tvm_version() -> str:
    return importlib.metadata.version("apache-tvm")


@functools.cache
def templates_digest() -> str:
    """Changes with every edit of the templates: a schedule's time means nothing for other code."""
    digest = hashlib.sha256()
    folder = Path(kernels.__file__).parent
    for path in (*sorted(folder.glob("*.py")), folder.with_name("generic.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def make_task(spec: Spec, micro: MicroKernel, target: Target, threads: int) -> Task:
    return Task(canonical(spec), micro, json.dumps(dict(target.tvm), sort_keys=True), threads)


SCALE, ZERO_POINT = 0.05, 3  # stand for any scale but 1 and any zero point but 0


def canonical(spec: Spec) -> Spec:
    """The same kernel with other quantization constants, which cost nothing: layers that differ in them are one task."""
    epilogue = tuple(_canonical(step) for step in spec.epilogue)
    if isinstance(spec, ConvSpec | ConvTransposeSpec):
        pad = ZERO_POINT if spec.data_dtype in ("uint8", "int8") else 0
        return dataclasses.replace(spec, epilogue=epilogue, pad_value=pad)
    return _canonical(dataclasses.replace(spec, epilogue=epilogue))


def _canonical(value: Any) -> Any:
    """Any scale and zero point of a dataclass by those that stand for it."""
    names = {one.name for one in dataclasses.fields(value)}
    if not {"scale", "zero_point"} <= names:
        return value
    scale = 1.0 if value.scale == 1.0 else SCALE
    return dataclasses.replace(value, scale=scale, zero_point=ZERO_POINT if value.zero_point else 0)


def tasks_of(graph: Graph, target: Target, threads: int, compact: bool = False) -> dict[Task, int]:
    """The kernels of a graph that have schedules and how often each is called, those of templates first.

    With `compact`, weights that are stored as codes are decoded by their kernels wherever that can be.
    """
    from hwopt.backends.tvm.build import fused
    from hwopt.backends.tvm.fold import folded
    from hwopt.backends.tvm.lower import Lowering

    lowering = Lowering(folded(graph), target, threads, compact=compact)
    module = lowering.module()
    calls: Counter[Task] = Counter()
    for (spec, micro), count in lowering.templates.calls.items():
        calls[make_task(spec, micro, target, threads)] += count

    def noted(spec: Spec, micro: MicroKernel, threads: int) -> Schedule:
        calls[make_task(spec, micro, target, threads)] += 1
        return kernels.default_schedule(spec, micro, threads)

    fused(module, target, threads, noted)
    return dict(calls)
