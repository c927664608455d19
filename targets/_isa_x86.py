"""Micro-kernels of x86-64 by the features of /proc/cpuinfo, and the LLVM names that go with them.

Sources: Intel, "Intrinsics guide" (vpdpbusd, vpmaddwd, vpmovzxbw); System V psABI, x86-64 microarchitecture levels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Set

from hwopt.target import MicroKernel

_V3 = ("avx2", "fma")
_V4 = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "fma")

AVX512_FLOAT = MicroKernel("float32", 16, 1, 32, "float32", "float32", "llvm.fma", _V4)
AVX2_FLOAT = MicroKernel("float32", 8, 1, 16, "float32", "float32", "llvm.fma", _V3)
SSE_FLOAT = MicroKernel("float32", 4, 1, 16, "float32", "float32")

# u8 x s8: four products are added into an int32 without saturation
AVX512_VNNI = MicroKernel(
    "int8", 16, 4, 32, "int32", "uint8", "llvm.x86.avx512.vpdpbusd.512", (*_V4, "avx512vnni"),
    wide="llvm.x86.avx512.vpdpwssd.512",
)  # fmt: skip
AVX_VNNI = MicroKernel(
    "int8", 8, 4, 16, "int32", "uint8", "llvm.x86.avx512.vpdpbusd.256", (*_V3, "avxvnni"), wide="llvm.x86.avx512.vpdpwssd.256"
)  # fmt: skip


def _widening(lanes: int, registers: int, name: str, features: tuple[str, ...]) -> MicroKernel:
    """Without VNNI bytes are widened and added in pairs by vpmaddwd, which is exact."""
    return MicroKernel("int8", lanes, 2, registers, "int32", "uint8", name, features, wide=name)


def _narrow(name: str, features: tuple[str, ...], otherwise: MicroKernel) -> MicroKernel:
    """vpmaddubsw saturates at 16 bits: small weights only. Two registers hold ones and what it finds."""
    return dataclasses.replace(
        otherwise, depth=4, registers=otherwise.registers - 2, intrinsic=name, features=features, others=(otherwise,), narrow=1
    )


def _paired(otherwise: MicroKernel) -> MicroKernel:
    """Two words of such products added in 16 bits: vpmaddwd, and its pipes, are needed half as often."""
    return dataclasses.replace(otherwise, depth=8, others=(otherwise, *otherwise.others), narrow=2)


AVX512_INT16 = _widening(16, 32, "llvm.x86.avx512.pmaddw.d.512", _V4)
AVX2_INT16 = _widening(8, 16, "llvm.x86.avx2.pmadd.wd", _V3)
SSE_INT16 = _widening(4, 16, "llvm.x86.sse2.pmadd.wd", ())
AVX512_BYTES = _narrow("llvm.x86.avx512.pmaddubs.w.512", _V4, AVX512_INT16)
AVX512_PAIRS = _paired(AVX512_BYTES)
AVX2_BYTES = _narrow("llvm.x86.avx2.pmadd.ub.sw", _V3, AVX2_INT16)
AVX2_PAIRS = _paired(AVX2_BYTES)
SSE_BYTES = _narrow("llvm.x86.ssse3.pmadd.ub.sw.128", ("ssse3",), SSE_INT16)
SSE_PAIRS = _paired(SSE_BYTES)

# Intel, "BFLOAT16 - hardware numerics definition" (2018): pairs of products, denormals as zeros. Its conversion (vcvtneps2bf16)
# serves the float32 kernels as well.
AVX512_BF16_FEATURES = (*_V4, "avx512bf16")
AVX512_BF16 = MicroKernel(
    "bfloat16", 16, 2, 32, "float32", "bfloat16", "llvm.x86.avx512bf16.dpbf16ps.512", AVX512_BF16_FEATURES
)  # fmt: skip

# Products of tiles: 16 positions x 64 bytes of data, 64 bytes x 16 channels of weights. Intel SDM volume 2, TDPBUSD, TDPBF16PS.
_TILE = ("amx-tile",)
AMX_INT8 = MicroKernel(
    "int8", 16, 64, 8, "int32", "uint8", "llvm.x86.tdpbusd", (*AVX512_VNNI.features, *_TILE, "amx-int8"), 16,
    others=(AVX512_VNNI,)
)  # fmt: skip
AMX_BF16 = MicroKernel(
    "bfloat16", 16, 32, 8, "float32", "bfloat16", "llvm.x86.tdpbf16ps", (*AVX512_BF16_FEATURES, *_TILE, "amx-bf16"), 16,
    others=(AVX512_BF16,),
)  # fmt: skip

_CPUINFO = {"avx512f", "avx512bw", "avx512vl", "avx512dq"}


def microkernels(features: Set[str]) -> dict[str, MicroKernel]:
    """The best micro-kernel per dtype of a processor whose flags /proc/cpuinfo shows as `features`."""
    kernels = {"float32": _float(features), "int8": _integer(features)}
    if features >= _CPUINFO and "avx512_bf16" in features:
        kernels["float32"] = dataclasses.replace(AVX512_FLOAT, features=AVX512_BF16_FEATURES)
        kernels["bfloat16"] = AMX_BF16 if {"amx_tile", "amx_bf16"} <= features else AVX512_BF16
    return kernels


def llvm(features: Set[str]) -> dict[str, object]:
    """The TVM target for these flags: a microarchitecture level and what the micro-kernels need beyond it."""
    kernels = microkernels(features)
    needed = dict.fromkeys(name for kernel in kernels.values() for name in kernel.features)
    if features >= _CPUINFO and "avx512vbmi" in features:
        needed["avx512vbmi"] = None  # permutations of bytes, for tables
    return {
        "kind": "llvm",
        "mtriple": "x86_64-linux-gnu",
        "mcpu": _level(features),
        "mattr": [f"+{name}" for name in needed],
    }


def _level(features: Set[str]) -> str:
    if features >= _CPUINFO:
        return "x86-64-v4"
    if {"avx2", "fma"} <= features:
        return "x86-64-v3"
    return "x86-64-v2" if {"sse4_2", "ssse3", "popcnt"} <= features else "x86-64"


def _float(features: Set[str]) -> MicroKernel:
    if features >= _CPUINFO:
        return AVX512_FLOAT
    return AVX2_FLOAT if {"avx2", "fma"} <= features else SSE_FLOAT


def _integer(features: Set[str]) -> MicroKernel:
    if features >= _CPUINFO:
        if {"amx_tile", "amx_int8", "avx512_vnni"} <= features:
            return AMX_INT8
        return AVX512_VNNI if "avx512_vnni" in features else AVX512_PAIRS
    if {"avx2", "fma"} <= features:
        return AVX_VNNI if "avx_vnni" in features else AVX2_PAIRS
    return SSE_PAIRS if "ssse3" in features else SSE_INT16
