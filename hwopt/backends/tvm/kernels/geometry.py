"""Convolutions and matmuls with packed weights as one implicit GEMM: output positions x output channels x (taps, runs)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hwopt.backends.tvm.kernels.phases import AxisPhase, frame, phases
from hwopt.backends.tvm.kernels.spec import ConvSpec, ConvTransposeSpec, MatmulSpec, Mean, Product, Step, by_image


@dataclass(frozen=True)
class Geometry:
    """The products behind one kernel. A tap reads `run` neighbouring elements of the channels-last data.

    Along a kernel row without dilation, taps are neighbours too: the row is a single tap with run = width x channels, which
    also serves the small channel counts of first layers. Data is [images, height, width, channels].
    """

    images: int
    height: int
    width: int
    channels: int
    rows: int  # of output positions
    columns: int
    n: int  # output channels per group
    groups: int = 1
    taps: tuple[int, int] = (1, 1)  # down, across
    run: int = 1
    strides: tuple[int, int] = (1, 1)
    dilations: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    data_dtype: str = "float32"
    weight_dtype: str = "float32"
    out_dtype: str = "float32"
    accumulator: str = "float32"
    pad_value: int = 0
    epilogue: tuple[Step, ...] = ()
    computed: bool = False  # the weights are packed by the kernel, so a task should reuse them for all positions
    heads: int = 1  # images whose elements lie beside one another at every position, on the sides named by `beside`
    beside: tuple[str, ...] = ()

    @property
    def padded(self) -> bool:
        return any(self.pads)

    @property
    def pooled(self) -> bool:
        """Whether an image's positions are averaged, so that one task takes them all."""
        return any(isinstance(step, Mean) for step in self.epilogue)

    @property
    def padded_width(self) -> int:
        return self.width + self.pads[1] + self.pads[3]

    @property
    def out_channels(self) -> int:
        return self.n * self.groups

    @property
    def macs(self) -> int:
        return self.images * self.rows * self.columns * self.out_channels * self.taps[0] * self.taps[1] * self.run

    def words(self, depth: int) -> int:
        """Steps of a micro-kernel along one tap."""
        return -(-self.run // depth)

    def vectors(self, lanes: int) -> int:
        """Vectors of output channels per group, the last one possibly partial."""
        return -(-self.n // lanes)


def geometry(spec: ConvSpec | MatmulSpec | ConvTransposeSpec) -> Geometry:
    """The implicit GEMM of a convolution or a matmul; the largest phase's of a transposed convolution."""
    if isinstance(spec, ConvTransposeSpec):
        return max((of_phase(spec, *phase) for phase in phases(spec)), key=lambda shape: shape.macs)
    return _of_conv(spec) if isinstance(spec, ConvSpec) else _of_matmul(spec)


def _common(spec: Product) -> dict[str, Any]:
    """What all products hand on."""
    names = ("data_dtype", "weight_dtype", "out_dtype", "accumulator", "epilogue")
    return {name: getattr(spec, name) for name in names}


def _across(spec: ConvSpec | ConvTransposeSpec, kernel: tuple[int, int], dilation: int) -> dict[str, Any]:
    """Taps and runs: those along a row are one tap where they are neighbours, and all channels belong to them."""
    depth = spec.in_channels // spec.groups
    if spec.groups == 1 and (dilation == 1 or kernel[1] == 1):
        return {"taps": (kernel[0], 1), "run": depth * kernel[1]}
    return {"taps": kernel, "run": depth}


def _of_matmul(spec: MatmulSpec) -> Geometry:
    images = 1 if spec.constant else spec.batch
    columns = spec.batch * spec.m // images
    return Geometry(
        images=images,
        height=1,
        width=columns,
        channels=spec.k,
        rows=1,
        columns=columns,
        n=spec.n,
        run=spec.k,
        **_common(spec),
        computed=not spec.constant,
        heads=spec.heads,
        beside=spec.beside,
    )


def _of_conv(spec: ConvSpec) -> Geometry:
    images, height, width, rows, columns = spec.batch, spec.height, spec.width, spec.out_height, spec.out_width
    pointwise = spec.kernel == (1, 1) and spec.strides == (1, 1) and not any(spec.pads)
    if pointwise:
        images = images if by_image(spec.epilogue) else 1
        height, rows = 1, 1
        width = columns = spec.batch * spec.height * spec.width // images
    return Geometry(
        images=images,
        height=height,
        width=width,
        channels=spec.in_channels,
        rows=rows,
        columns=columns,
        n=spec.out_channels // spec.groups,
        groups=spec.groups,
        **_across(spec, spec.kernel, spec.dilations[1]),
        strides=spec.strides,
        dilations=spec.dilations,
        pads=spec.pads,
        pad_value=spec.pad_value,
        **_common(spec),
    )


def of_phase(spec: ConvTransposeSpec, down: AxisPhase, across: AxisPhase) -> Geometry:
    """One phase. `pads` are those of all phases together, whose workspace they share."""
    rows, columns = frame(spec, 0), frame(spec, 1)
    return Geometry(
        images=spec.batch,
        height=spec.height,
        width=spec.width,
        channels=spec.in_channels,
        rows=down.count,
        columns=across.count,
        n=spec.out_channels // spec.groups,
        groups=spec.groups,
        **_across(spec, (down.window, across.window), across.step),
        dilations=(down.step, across.step),
        pads=(rows.before, columns.before, rows.after, columns.after),
        pad_value=spec.pad_value,
        **_common(spec),
    )
