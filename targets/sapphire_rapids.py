"""Intel Xeon of the fourth generation (Sapphire Rapids, 2023) and later: AMX tiles for int8 and bfloat16.

Caches: Intel, "Xeon Platinum 8480+" (2023); bytes per cycle: Intel, "64 and IA-32 architectures optimization manual". A core
that was measured multiplied 6.0e12 int8 operations a second, which at 2048 a cycle is the clock below.
"""

from __future__ import annotations

import platform

from hwopt.target import Memory, Target
from targets import _isa_x86
from targets._cpu import cpu_features, needed_features, operations_per_cycle
from targets._tiles import priced

HERTZ = 2.9e9
VECTORS = ("avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "avx512_bf16")
FLAGS = frozenset((*VECTORS, "amx_tile", "amx_int8", "amx_bf16"))  # of /proc/cpuinfo, as far as the micro-kernels ask
MEMORIES = (
    Memory("l1", 48 << 10, 128 * HERTZ),
    Memory("l2", 2 << 20, 48 * HERTZ),
    Memory("l3", 105 << 20, 8 * HERTZ),
    Memory("ddr5", 64 << 30, 12e9),
)
JOULES_PER_OP = {"float32": 25e-12, "bfloat16": 3e-12, "int8": 1.5e-12}  # about 5 W a core over the peaks
KERNELS, LLVM = _isa_x86.microkernels(FLAGS), _isa_x86.llvm(FLAGS)
NEEDED = needed_features(LLVM)

TARGET = Target(
    name="sapphire-rapids",
    summary="an Intel Xeon with AMX (Sapphire Rapids and later) at 2.9 GHz",
    kind="cpu",
    cores=1,  # nobody knows how many it will be: a program may ask for more threads when it runs
    peak={dtype: operations_per_cycle(kernel) * HERTZ for dtype, kernel in KERNELS.items()},
    memories=MEMORIES,
    granule={dtype: kernel.lanes for dtype, kernel in KERNELS.items()},
    cost=priced(KERNELS, MEMORIES, HERTZ, JOULES_PER_OP),
    tvm=LLVM,
    microkernels=KERNELS,
    features=NEEDED,
    runs_here=platform.machine() in ("x86_64", "AMD64") and set(NEEDED) <= cpu_features(),
)
