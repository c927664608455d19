"""`hwopt profile --device`: measure a device, and write a target file that plans with what was measured.

Its memories and the rates of its products come first (probe.py), then kernels of random networks, each where it stands in its
network, until the time is over. Runs are repeated; the clock's reference is timed beside each: a network during which it moved is
measured once more after a pause, and then not recorded. A kernel whose usual time lies far above its best one was disturbed, and
is not believed (learn/records.py).
"""

from __future__ import annotations

import datetime
import json
import re
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from hwopt.backends.tvm.build import compile_program
from hwopt.backends.tvm.learn.measure import LOW, Profile, attribute
from hwopt.backends.tvm.learn.model import CYCLES
from hwopt.backends.tvm.learn.records import HELD, append, clocked, quality, read, records_of, table_of
from hwopt.device import link, probe
from hwopt.device.bench import tensors_on
from hwopt.device.fit import check_fit
from hwopt.device.link import Address
from hwopt.device.runner import ATTEMPTS, COOL_SECONDS, DRIFT, DeviceRunner
from hwopt.device.session import remote
from hwopt.device.watchdog import Watchdog
from hwopt.emit.stamps import Stamped, build_stamped
from hwopt.errors import DeviceError, HwoptError, UsageError
from hwopt.files import check_writable, write_whole
from hwopt.ir import Graph, numpy_dtype
from hwopt.plugins import find_target_files
from hwopt.profiling import State, form_of, sample_graph
from hwopt.target import Memory, Target
from hwopt.target_file import load_target

SECONDS = 0.4  # that one network is run
LEAST, MOST = 12, 400  # passes of it
TOO_LONG, TURN = 60.0, 2.0  # seconds of all passes of a network, and of one call
SESSION_SECONDS, HANG_SECONDS = 600, 60.0


@dataclass(frozen=True)
class Figures:
    """What a target file says of a device."""

    device: Mapping[str, Any]
    memories: tuple[Memory, ...]
    clock_hz: float
    rates: Mapping[str, float] = field(default_factory=dict)  # operations a second of one core, by dtype

    def text(self, name: str, table: str = "", kernels: int = 0) -> str:
        """The file, as targets of the kind cpu are written."""
        told, date = str(self.device["name"]), datetime.date.today().isoformat()
        each = {dtype: self.rates.get(dtype, self.clock_hz) / self.clock_hz for dtype in ("float32", "int8")}
        values = {
            "name": name, "kind": "cpu", "summary": f"{told}, measured {date}", "machine": self.device["machine"],
            "cores": self.device["cores"], "clock_hz": self.clock_hz, "features": list(self.device["features"]),
            **{f"{dtype}_ops_per_cycle": round(rate, 3) for dtype, rate in each.items()}, **({"table": table} if table else {}),
        }  # fmt: skip
        lines = [f"# {told}: measured by hwopt profile, {date}; {kernels} kernels in the table"]
        lines += [f"{key} = {json.dumps(value)}" for key, value in values.items()]
        for one in self.memories:
            rate = f"{one.bytes_per_second:.4g}"
            lines += ["", "[[memories]]", f"name = {json.dumps(one.name)}", f"bytes = {one.bytes}", f"bytes_per_second = {rate}"]
        return "\n".join(lines) + "\n"

    def target(self, folder: Path) -> Target:
        """The same as a target, without a table."""
        file = folder / "device.toml"
        file.write_text(self.text("device"))
        return load_target(file, find_target_files())


def profile_device(
    address: Address, seconds: float, out: Path, *, threads: int = 1, drift: float = DRIFT,
    watch: Callable[[State], None] = lambda _: None,
) -> tuple[Path, State]:  # fmt: skip
    """Measure for a time and write `out`, a target file, and its table beside it with the suffix .json.

    Measurements are kept beside them, too (.jsonl): the next call goes on from there. Raises DeviceError where the device goes
    away, hangs, or has no steady clock.
    """
    if out.suffix != ".toml":
        raise UsageError("a device's profile is a target file", place=str(out), hint="write -o my_board.toml")
    check_writable(out)
    device, log = link.facts(address), out.with_suffix(".jsonl")
    state = State(read(log), time.monotonic(), seconds)
    with tempfile.TemporaryDirectory(prefix="hwopt-") as folder:
        figures = measured_figures(address, device, threads, Path(folder), drift)
        target = figures.target(Path(folder))
        try:
            _measure_kernels(address, target, threads, log, drift, state, watch)
        finally:
            _write(out, figures, target, state)
    return out, state


def measured_figures(address: Address, device: Mapping[str, Any], threads: int, folder: Path, drift: float = DRIFT) -> Figures:
    """Memories, clock and rates. The clock is the stated one, else what the reference's time means on most processors."""
    stated, size = float(device["clock_most_khz"]) * 1e3, int(device["memory_mb"]) << 20
    figures = Figures(device, (Memory("dram", size, 1e9),), stated or 1e9)
    target = figures.target(folder)
    check_fit(device, target, threads, str(address))
    found = probe.memories(address, target, size, folder, drift)
    device = {**device, "features": target.features}
    figures = Figures(device, found.levels, stated or CYCLES / found.clock)
    with DeviceRunner(address, 1, drift=drift) as runner:
        return replace(figures, rates=probe.rates(target, runner, str(address)))


def _write(out: Path, figures: Figures, target: Target, state: State) -> None:
    """The table first, so that the file never names one that is not there; none for too few kernels."""
    kept, table = clocked(state.records), out.with_suffix(".json")
    if len(kept) >= 2 * HELD:
        state.quality = quality(kept, target)
        made = table_of(state.records, target, state.quality)
        write_whole(table, replace(made, cpu=str(figures.device["name"])).to_json())
    name = re.sub(r"[^\w.-]", "-", out.stem, flags=re.ASCII).lstrip("-._") or "device"
    write_whole(out, figures.text(name, table.name if table.exists() else "", len(kept)))


def _measure_kernels(
    address: Address, target: Target, threads: int, log: Path, drift: float, state: State, watch: Callable[[State], None]
) -> None:
    """One network after the other until the time is over; a device that is gone ends it."""
    number = max((one.seed for one in state.records), default=-1) + 1
    while state.share < 1:
        form = form_of(number, target)
        try:
            found = _measured(sample_graph(number, form, target), target, threads, address, drift)
        except HwoptError as error:
            if isinstance(error, DeviceError):
                link.facts(address)  # where it is gone nothing more can be measured
            state.failures.append(f"network {number} {form}: {error}")
        else:
            records = records_of(found, threads, number, form)
            append(log, records)
            state.records.extend(records)
        number += 1
        watch(state)


class UnsteadyError(HwoptError):
    """The clock moved while something was measured, or it takes too long to tell."""


def _measured(graph: Graph, target: Target, threads: int, address: Address, drift: float) -> Profile:
    """Every kernel of a network on the device; raises UnsteadyError where the clock moved, also the second time."""
    program = compile_program(graph, target, threads, "profile")
    with tempfile.TemporaryDirectory(prefix="hwopt-") as folder:
        made = build_stamped(program, Path(folder), target.features, threads)
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(COOL_SECONDS)
            times = timed_calls(address, made, threads)
            moved = probe.steady(times[:, -1].tolist(), drift)
            if not moved:
                best, low = times[:, :-1].min(0), np.percentile(times[:, :-1], LOW, axis=0)
                samples, other = attribute(graph, program.calls, best, low / np.maximum(best, 1e-9) - 1)
                return Profile(tuple(samples), float(best.sum()), other, float(times[:, -1].min()))
    raise UnsteadyError(moved)


def timed_calls(address: Address, made: Stamped, threads: int, seconds: float = SECONDS) -> np.ndarray:
    """Seconds of every call in every pass, and of the clock's reference behind it: [passes, calls + 1]."""
    import tvm

    with remote(address, SESSION_SECONDS) as session, Watchdog(session, HANG_SECONDS, str(address)) as dog:
        session.upload(str(made.path))
        call = session.load_module(made.path.name)["hwopt_stamp_calls"]
        tensors = tensors_on(session, _pictures(made), made.outputs)

        def passes(count: int) -> np.ndarray:
            table = tvm.runtime.empty((count, made.calls + 1), "float64", session.cpu(0))
            dog.feed()
            if call(count, threads, *tensors, table):
                raise DeviceError("a kernel failed", place=str(address))
            return table.numpy()

        once = max(float(passes(1).sum()), 1e-9)
        if once * LEAST > TOO_LONG:
            raise UnsteadyError(f"takes {once:.2g} s a run on this device: too long to repeat it")
        count = int(np.clip(seconds / once, LEAST, MOST))
        each = max(1, int(TURN / once))  # what one call there may take, far from what makes the watchdog bark
        return np.concatenate([passes(min(each, count - done)) for done in range(0, count, each)])


def _pictures(made: Stamped) -> list[np.ndarray]:
    """Inputs from 0 to 2, indices of any embedding among them."""
    random = np.random.default_rng(0)
    return [(2 * random.random(one.type.dims)).astype(numpy_dtype(one.type.dtype)) for one in made.inputs]
