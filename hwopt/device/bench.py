"""An artifact's library, timed on a device: uploaded with a few lines of C that call it, several libraries in turns."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hwopt.artifact import Artifact
from hwopt.device import link
from hwopt.device.fit import check_features
from hwopt.device.link import Address
from hwopt.device.session import remote
from hwopt.device.watchdog import Watchdog
from hwopt.emit import Tensor
from hwopt.emit.toolchain import find_compiler, run_compiler
from hwopt.errors import DeviceError, UnsupportedError
from hwopt.measure import Timing

ROUNDS, TURN_SECONDS = 20, 0.02
SESSION_SECONDS = 900
HANG_SECONDS = 120.0  # an upload, or a turn: milliseconds of runs, or one run of a large model

# (runs, threads, tensors...) -> seconds of one run, or the error code of a run that failed
SOURCE = """\
#define _POSIX_C_SOURCE 200809L
#include "hwopt_types.h"
#include "hwopt_runtime.h"
#include "{name}.h"
#include <string.h>
#include <time.h>
int __tvm_ffi_hwopt_bench(void *self, const TVMFFIAny *given, int32_t count, TVMFFIAny *result);
int __tvm_ffi_hwopt_bench(void *self, const TVMFFIAny *given, int32_t count, TVMFFIAny *result) {{
  struct timespec from, to;
  double seconds = -100;
  int code = 0;
  (void)self;
  if (count == {tensors} + 2) {{
    {name}_set_threads((int)given[1].value.v_int64);
    clock_gettime(CLOCK_MONOTONIC, &from);
    for (int64_t i = 0; i < given[0].value.v_int64 && !code; ++i) code = {name}_run({arguments}, NULL);
    clock_gettime(CLOCK_MONOTONIC, &to);
    seconds = ((double)(to.tv_sec - from.tv_sec) + 1e-9 * (double)(to.tv_nsec - from.tv_nsec)) / (double)given[0].value.v_int64;
  }}
  if (code) seconds = code;
  result->type_index = 3;
  memcpy(&result->value, &seconds, sizeof seconds);
  return 0;
}}
"""


def bench(
    artifacts: Mapping[str, Path], address: Address, rounds: int = ROUNDS, threads: int | None = None, hang: float = HANG_SECONDS
) -> dict[str, Timing]:
    """Seconds of one run of each, interleaved; raises DeviceError where the device cannot run one, hangs, or goes away."""
    device = link.facts(address)
    with (
        tempfile.TemporaryDirectory(prefix="hwopt-") as folder,
        remote(address, SESSION_SECONDS) as session,
        Watchdog(session, hang, str(address)) as dog,
    ):
        calls = {}
        for at, (name, path) in enumerate(artifacts.items()):
            artifact = Artifact(path, foreign=True)
            calls[name] = _loaded(session, artifact, Path(folder) / str(at), at, device, threads, address, dog)
        return _turns(calls, rounds)


def _loaded(
    session: Any,
    artifact: Artifact,
    folder: Path,
    at: int,
    device: Mapping[str, Any],
    threads: int | None,
    address: Address,
    dog: Watchdog,
) -> Callable[[int], float]:
    """A function that runs the artifact so many times there: seconds of one run."""
    manifest = artifact.manifest
    name, machine = manifest["name"], manifest["machine"]
    if artifact.kind != "c" or not manifest["library"]:
        raise UnsupportedError("holds no library of plain C", place=str(artifact.path), hint="compile with --emit shared")
    if machine != device["machine"]:
        raise DeviceError(f"is a {device['machine']}, the artifact for {machine}", place=str(address))
    check_features(device, tuple(manifest["features"]), str(address))
    wrapper = _wrapper(artifact, folder, at)
    for file in (folder / f"model{at}.so", wrapper):
        session.upload(str(file))
        dog.feed()
    call = session.load_module(wrapper.name)["hwopt_bench"]
    tensors = _tensors(session, artifact)
    used = threads or min(manifest["threads"], device["cores"])

    def run(times: int) -> float:
        dog.feed()
        seconds = float(call(times, used, *tensors))
        if seconds < 0:
            raise DeviceError(f"{name}_run returns {int(seconds)}", place=str(address), hint="the codes are in hwopt_types.h")
        return seconds

    return run


def _wrapper(artifact: Artifact, folder: Path, at: int) -> Path:
    """Two libraries in `folder`: the artifact's, under a name of its own on the device, and what calls it by TVM's convention."""
    manifest = artifact.manifest
    name, count = manifest["name"], len(artifact.inputs) + len(artifact.outputs)
    folder.mkdir()
    library = folder / f"model{at}.so"
    library.write_bytes((artifact.path / manifest["library"]).read_bytes())
    arguments = ", ".join(f"((DLTensor *)given[{place + 2}].value.v_ptr)->data" for place in range(count))
    (folder / "bench.c").write_text(SOURCE.format(name=name, tensors=count, arguments=arguments))
    emit = Path(__file__).parents[1] / "emit"
    flags = ["-std=c11", "-O2", "-fPIC", "-shared", f"-I{emit}", f"-I{artifact.path}"]
    made = folder / f"bench{at}.so"
    links = ["-L.", f"-l:model{at}.so", "-Wl,-rpath,$ORIGIN"]
    run_compiler([*find_compiler(manifest["machine"]), *flags, "bench.c", "-o", made.name, *links], folder)
    return made


def _tensors(session: Any, artifact: Artifact) -> list[Any]:
    return tensors_on(session, list(artifact.random_inputs().values()), artifact.outputs)


def tensors_on(session: Any, inputs: Sequence[np.ndarray], outputs: Sequence[Tensor]) -> list[Any]:
    """The arrays on the device, and room for results."""
    import tvm

    made = []
    for array in inputs:
        made.append(tvm.runtime.empty(array.shape, _dtype(array.dtype), session.cpu(0)))
        made[-1].copyfrom(array.view(_bits(array.dtype)))
    for tensor in outputs:
        shape = [dim if isinstance(dim, int) else 1 for dim in tensor.type.shape or ()]
        made.append(tvm.runtime.empty(shape, tensor.type.dtype, session.cpu(0)))
    return made


def _dtype(dtype: np.dtype) -> str:
    return _bits(dtype).name


def _bits(dtype: np.dtype) -> np.dtype:
    """The library takes a pointer: any dtype of that size will do where TVM has no such one."""
    return dtype if dtype.kind in "iuf" else np.dtype(f"u{dtype.itemsize}")


def _turns(calls: Mapping[str, Callable[[int], float]], rounds: int) -> dict[str, Timing]:
    repeats = {}
    for name, call in calls.items():
        call(1)
        repeats[name] = max(1, int(TURN_SECONDS / max(min(call(1) for _ in range(3)), 1e-7)))
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            seconds[name].append(call(repeats[name]))
    found = {}
    for name, values in seconds.items():
        low, median, high = np.percentile(values, (25, 50, 75))
        found[name] = Timing(float(median), float(low), float(high), rounds * repeats[name])
    return found
