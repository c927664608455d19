"""A transposed convolution as sub-pixel phases: stride x stride small convolutions of the same input, each writing every
stride-th output position. No zeros are inserted and none are multiplied.

Output y = stride * q + r takes the taps k with k * dilation = r + pad (mod stride), each from the input at
q + (r + pad - k * dilation) / stride.
Shi et al., "Is the deconvolution layer the same as a convolutional layer?", 2016.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from hwopt.backends.tvm.kernels.spec import ConvTransposeSpec


@dataclass(frozen=True)
class AxisPhase:
    """One phase along one axis. Without `taps` nothing but the bias arrives there: `window` is one tap of zero weights then."""

    offset: int  # of its first output position; the next are a stride apart
    count: int  # output positions
    taps: tuple[int, ...]  # kernel positions in the order in which they meet the input
    step: int  # input positions between taps
    start: int  # the input position under the first tap of the first output; may lie outside

    @property
    def window(self) -> int:
        return max(1, len(self.taps))

    @property
    def last(self) -> int:
        """The input position under the last tap of the first output."""
        return self.start + (self.window - 1) * self.step


@dataclass(frozen=True)
class Frame:
    """What the phases of an axis read together: input positions [lowest, highest] for output 0, and the padding around it."""

    lowest: int
    highest: int
    before: int
    after: int
    count: int  # the most output positions of a phase


def axis_phases(spec: ConvTransposeSpec, axis: int) -> tuple[AxisPhase, ...]:
    """The phases along height (0) or width (1), at most `stride` of them."""
    size, stride = (spec.out_height, spec.out_width)[axis], spec.strides[axis]
    dilation, pad = spec.dilations[axis], spec.pads[axis]
    found = []
    for offset in range(min(stride, size)):
        taps = [tap for tap in range(spec.kernel[axis]) if (tap * dilation - offset - pad) % stride == 0]
        start = (offset + pad - taps[-1] * dilation) // stride if taps else 0
        count = -(-(size - offset) // stride)
        found.append(AxisPhase(offset, count, tuple(reversed(taps)), dilation // math.gcd(stride, dilation), start))
    return tuple(found)


def frame(spec: ConvTransposeSpec, axis: int) -> Frame:
    """What all phases of an axis read."""
    phases, size = axis_phases(spec, axis), (spec.height, spec.width)[axis]
    lowest, highest = min(one.start for one in phases), max(one.last for one in phases)
    furthest = max(one.last + one.count for one in phases)
    return Frame(lowest, highest, max(0, -lowest), max(0, furthest - size), max(one.count for one in phases))


def phases(spec: ConvTransposeSpec) -> tuple[tuple[AxisPhase, AxisPhase], ...]:
    """All phases, down x across: the order in which their weights and biases are packed."""
    return tuple(itertools.product(axis_phases(spec, 0), axis_phases(spec, 1)))
