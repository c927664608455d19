"""The figures of a device's target file: its clock, its memories, and what one core's products and sums reach."""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hwopt.backends.tvm.kernels.spec import MatmulSpec
from hwopt.backends.tvm.tune.builder import build_candidate
from hwopt.backends.tvm.tune.runner import Kernels, Runner
from hwopt.backends.tvm.tune.session import signature
from hwopt.backends.tvm.tune.task import Task, make_task, operations
from hwopt.device.build import machine_of_target
from hwopt.device.link import Address
from hwopt.device.runner import ATTEMPTS, COOL_SECONDS, DISTURBED, DRIFT
from hwopt.device.session import remote
from hwopt.device.watchdog import Watchdog
from hwopt.emit.toolchain import find_compiler, run_compiler
from hwopt.errors import DeviceError, ToolchainError
from hwopt.target import Memory, Target

HERE, EMIT = Path(__file__).parent, Path(__file__).parents[1] / "emit"
USUAL_CACHES = (32 << 10, 512 << 10)  # where the system does not tell
LEVELS = (1, 2, 3)
FAR = 8  # main memory is read over so many times the last cache, at least
LEAST_FAR, MOST_FAR = 32 << 20, 256 << 20
ROUNDS, TURN_SECONDS = 9, 2e-3
SESSION_SECONDS, HANG_SECONDS = 600, 60.0


@dataclass(frozen=True)
class Memories:
    """Data caches and main memory as one core reads them, nearest first, and the seconds of the clock's reference."""

    levels: tuple[Memory, ...]
    clock: float


def memories(address: Address, target: Target, total_bytes: int, folder: Path, drift: float = DRIFT) -> Memories:
    """Read every level in turns; raises DeviceError where the clock moves all the time, or the device goes away."""
    library = _library(target, folder)
    with remote(address, SESSION_SECONDS) as session, Watchdog(session, HANG_SECONDS, str(address)) as dog:
        session.upload(str(library))
        module = session.load_module(library.name)
        cache, read, clock = (module[f"hwopt_probe_{name}"] for name in ("cache", "read", "clock"))
        told = tuple(int(cache(level)) for level in LEVELS)
        sizes = tuple(size for size in told if size) or USUAL_CACHES
        spans = (*(size // 2 for size in sizes), min(max(LEAST_FAR, FAR * sizes[-1]), MOST_FAR))
        for attempt in range(ATTEMPTS):
            rates, ticks = _turns(spans, read, clock, dog)
            moved = steady(ticks, drift)
            if not moved:
                break
            if attempt + 1 == ATTEMPTS:
                raise DeviceError(moved, place=str(address), hint="let it cool, fix its clock, and profile again")
            time.sleep(COOL_SECONDS)
    names = (*(f"l{level}" for level, size in zip(LEVELS, told, strict=True) if size),) or ("l1", "l2")
    levels = [Memory(name, size, rate) for name, size, rate in zip(names, sizes, rates, strict=False)]
    return Memories((*levels, Memory("dram", max(total_bytes, sizes[-1]), rates[-1])), min(ticks))


def _turns(
    spans: Sequence[int], read: Callable[[int, int], float], clock: Callable[[], float], dog: Watchdog
) -> tuple[list[float], list[float]]:
    """Bytes a second of each span, of the best turn, and the seconds of the reference beside the turns."""
    times = {span: max(1, int(TURN_SECONDS / max(float(read(span, 1)), 1e-9))) for span in spans}
    best: dict[int, float] = dict.fromkeys(spans, float("inf"))
    ticks = []
    for _ in range(ROUNDS):
        for span in spans:
            dog.feed()
            best[span] = min(best[span], float(read(span, times[span])))
        ticks.append(float(clock()))
    return [span / best[span] for span in spans], ticks


def steady(ticks: Sequence[float], drift: float) -> str:
    """Why these times of the clock's reference say that it moved, or "". Disturbances only add: the fastest of a half counts."""
    usual = statistics.median(ticks)
    disturbed = sum(one > DISTURBED * usual for one in ticks)
    if 2 * disturbed >= len(ticks):
        return f"{disturbed} of {len(ticks)} rounds were disturbed"
    early, late = min(ticks[: len(ticks) // 2]), min(ticks[len(ticks) // 2 :])
    moved = max(early, late) / min(early, late) - 1
    return f"its clock moved by {moved:.1%} while it was measured" if moved > drift else ""


def rates(target: Target, runner: Runner, place: str) -> Mapping[str, float]:
    """Operations a second of one core, by dtype: products in the first level cache, by the micro-kernels that models will run."""
    found = {}
    for dtype, micro in target.microkernels.items():
        spec = MatmulSpec(1, 8, 8, 8, data_dtype=micro.activation, weight_dtype=micro.dtype, out_dtype=micro.accumulator)
        found[dtype] = _rate(make_task(spec, micro, target, 1).probe, runner, place)
    return found


def _rate(probe: Task, runner: Runner, place: str) -> float:
    built = build_candidate(probe, probe.default, "probe")
    if built.reason:
        raise ToolchainError(built.reason, place=probe.name)
    hot = tuple(("hot" if row[0] == "weights" else row[0], *row[1:]) for row in signature(probe, built.parameters))
    found = runner.measure(Kernels({"probe": built.data}, hot), 2 * ROUNDS)["probe"]
    if not found.times:
        raise DeviceError(f"a product {found.status}: {found.reason}", place=place)
    return operations(probe.spec) / min(found.times)


def _library(target: Target, folder: Path) -> Path:
    """Read as wide as the target's kernels read: LLVM's names of x86's instruction sets are the C compiler's."""
    machine = machine_of_target(target)
    shutil.copyfile(HERE / "probe.c", folder / "probe.c")
    wide = [f"-m{str(name)[1:]}" for name in target.tvm.get("mattr", ()) if machine == "x86_64"]
    flags = ["-std=gnu11", "-O3", *wide, "-fPIC", "-shared", f"-I{EMIT}"]
    run_compiler([*find_compiler(machine), *flags, "probe.c", "-o", "probe.so"], folder)
    return folder / "probe.so"
