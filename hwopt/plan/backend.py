"""What hwopt generates code for. It plans for other hardware, too: other backends compile that."""

from __future__ import annotations

from collections.abc import Iterable

from hwopt.pipeline import Pass, Phase
from hwopt.target import Target

CUDA = "cuda"  # the kind of TVM target that kernels for GPUs are generated for
FLOATS = "hwopt generates float kernels for CUDA only"


def generates(target: Target) -> bool:
    """True if there is a code generator for the target."""
    return target.kind == "cpu" or target.array is not None or target.tvm["kind"] == CUDA


def generated(target: Target, families: Iterable[type[Pass]]) -> tuple[type[Pass], ...]:
    """Those of the families whose results hwopt can compile for the target."""
    return tuple(kind for kind in families if target.tvm["kind"] != CUDA or kind.phase < Phase.SHARE)


def lacking(target: Target, passes: Iterable[Pass]) -> str:
    """What of a plan hwopt generates no code for; "" where it does for all of it."""
    kinds = {type(one) for one in passes}
    if not kinds:
        return ""
    if not generates(target):
        return f"hwopt generates no code for {target.name}; this plan needs another backend"
    if any(kind.phase == Phase.QUANTIZE for kind in kinds - set(generated(target, kinds))):
        return f"{FLOATS}; this plan's integers need another backend"
    return ""
