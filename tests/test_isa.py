"""Every micro-kernel that targets know, on every family of kernels: exact for integers, by the instruction it is for.

Each is executed where this machine or qemu-user can; its code is inspected everywhere.
"""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hwopt.analysis.narrow import NARROW
from hwopt.backends.tvm import kernels
from hwopt.backends.tvm.kernels import winograd_schedule
from hwopt.backends.tvm.kernels.spec import Activation, Bias, ConvSpec, MatmulSpec, PoolSpec, Quantize, Scale
from hwopt.emit import Buffer, Call, Program
from hwopt.emit.build import build_library
from hwopt.target import MicroKernel
from targets import _isa_arm, _isa_arm32, _isa_riscv, _isa_x86
from targets._cpu import needed_features
from tests._machines import Machine, RunError, execute
from tests.test_kernels import FLAGS, accumulators, pooled, quantized, random


@dataclass(frozen=True)
class Level:
    """An instruction set: the micro-kernel under test, TVM's target for it, and where it runs."""

    micro: MicroKernel
    instruction: str  # in the assembly
    tvm: Mapping[str, Any]
    machine: Machine

    @property
    def features(self) -> tuple[str, ...]:
        return needed_features(self.tvm)


def x86(level: str, integer: str, instruction: str, cpu: str = "") -> dict[str, Level]:
    """The float and the integer micro-kernel of a level, here or under emulation."""
    tvm, found = _isa_x86.llvm(FLAGS[level]), _isa_x86.microkernels(FLAGS[level])
    integers = found["int8"]
    floats = "vfmadd" if "fma" in found["float32"].features else "mulps"
    name = f"{level} on {cpu}" if cpu else level
    machine = Machine("x86_64", cpu)
    return {
        f"{name} float": Level(found["float32"], floats, tvm, machine),
        f"{name} {integer}": Level((integers, *integers.others)[-1], instruction, tvm, machine),
        **{
            f"{name} {('', 'pairs', 'two pairs')[one.narrow]}": Level(one, instruction.replace("wd", "ubsw"), tvm, machine)
            for one in (integers, *integers.others)
            if one.narrow
        },
    }


def arm(flags: set[str], instruction: str, cpu: str, micro: MicroKernel | None = None) -> Level:
    chosen = micro or _isa_arm.microkernels(flags)["int8"]
    return Level(chosen, instruction, _isa_arm.llvm(flags), Machine("aarch64", cpu))


LEVELS = {
    **x86("sse", "pmaddwd", "pmaddwd"),
    **x86("avx2", "vpmaddwd", "vpmaddwd"),
    **x86("avx2", "vpmaddwd", "vpmaddwd", "Haswell"),
    **x86("avx-vnni", "vpdpbusd", "{vex}\tvpdpbusd"),
    **x86("avx512", "vpmaddwd", "vpmaddwd"),
    **x86("avx512-vnni", "vpdpbusd", "vpdpbusd"),
    "neon float": arm(set(), "fmla", "cortex-a72", _isa_arm.NEON_FLOAT),
    "neon smull": arm(set(), "smull", "cortex-a72"),
    "dotprod sdot": arm({"asimddp"}, "sdot", "cortex-a76"),
    "i8mm smmla": arm({"asimddp", "i8mm"}, "smmla", "max"),
    "i8mm usmmla": arm({"asimddp", "i8mm"}, "usmmla", "max", _isa_arm.USMMLA),
    "i8mm usdot": arm({"asimddp", "i8mm"}, "usdot", "max", _isa_arm.USDOT),
}
ARM32, RV64 = Machine("arm", "cortex-a7"), Machine("riscv", "rv64")
LEVELS |= {
    "armv7 float": Level(_isa_arm32.NEON_FLOAT, "vfma.f32", _isa_arm32.llvm(), ARM32),
    "armv7 vmull": Level(_isa_arm32.NEON_INT8, "vmull.s8", _isa_arm32.llvm(), ARM32),
    "riscv64 float": Level(_isa_riscv.FLOAT, "fmadd.s", _isa_riscv.llvm(), RV64),
    "riscv64 int8": Level(_isa_riscv.INT8, "mul", _isa_riscv.llvm(), RV64),
}
CONVS = {
    "conv 3x3": {"height": 8, "width": 9, "in_channels": 16, "out_channels": 38, "kernel": (3, 3), "pads": (1, 1, 1, 1)},
    "conv 3x3 of 5": {"height": 9, "width": 7, "in_channels": 5, "out_channels": 19, "kernel": (3, 3), "pads": (1, 0, 2, 1)},
    "conv 3x3 by 2": {
        "height": 12, "width": 11, "in_channels": 3, "out_channels": 37, "kernel": (3, 3), "strides": (2, 2),
        "pads": (0, 0, 1, 1),
    },
    "grouped conv": {"height": 6, "width": 5, "in_channels": 20, "out_channels": 12, "kernel": (3, 3), "groups": 2},
    "conv 1x1": {"height": 5, "width": 7, "in_channels": 33, "out_channels": 50, "kernel": (1, 1)},
    "conv of one pixel": {"height": 1, "width": 1, "in_channels": 40, "out_channels": 24, "kernel": (1, 1)},
    "depthwise": {
        "height": 9, "width": 11, "in_channels": 37, "out_channels": 37, "kernel": (3, 3), "groups": 37, "pads": (1, 1, 1, 1),
    },
}  # fmt: skip
MATMULS = {
    "matmul": {"batch": 1, "m": 7, "n": 33, "k": 45},
    "matvec": {"batch": 1, "m": 1, "n": 70, "k": 30},
    "computed matmul": {"batch": 2, "m": 9, "n": 33, "k": 45, "constant": False},
    "computed transposed matmul": {"batch": 2, "m": 9, "n": 18, "k": 45, "constant": False, "transposed": True},
}
POOLS = {"max pool": "max", "average pool": "average"}
WINOGRAD = {"height": 9, "width": 14, "in_channels": 42, "out_channels": 43, "kernel": (3, 3), "pads": (0, 1, 1, 1)}
LAST = Quantize(0.07, 10, "int8")


def kinds(micro: MicroKernel) -> list[str]:
    return [*CONVS, *MATMULS, *POOLS, "requantized conv", *(["by Winograd"] if micro.wide or micro.dtype == "float32" else [])]


@dataclass(frozen=True, eq=False)
class Case:
    """One kernel with its operands and what it must compute."""

    spec: Any
    micro: MicroKernel
    data: np.ndarray
    constants: tuple[np.ndarray, ...]  # packed weights, tensors of the epilogue
    computed: tuple[np.ndarray, ...]  # right sides that are inputs
    wanted: np.ndarray


def suited(spec: Any, micro: MicroKernel) -> MicroKernel:
    """As the compiler chooses: the first that takes the kernel."""
    known = (micro, *micro.others, _isa_arm.USDOT, _isa_arm.SDOT)
    return next(one for one in known if one.activation == micro.activation and not kernels.supports(spec, one))


def case(kind: str, micro: MicroKernel) -> Case:
    types: dict[str, Any] = {"data_dtype": micro.activation, "weight_dtype": micro.dtype, "out_dtype": micro.accumulator}
    if kind in POOLS:
        return _pool(kind, micro)
    if kind in MATMULS:
        return _matmul(MatmulSpec(**MATMULS[kind], **types, narrow=micro.narrow * MATMULS[kind].get("constant", True)), micro)
    types["narrow"] = micro.narrow
    if kind == "requantized conv":
        return _requantized(ConvSpec(batch=1, **CONVS["conv 3x3"], **{**types, "out_dtype": "int8"}), micro)
    padding = 0 if micro.accumulator == "float32" else 7
    spec = ConvSpec(batch=2, **CONVS.get(kind, WINOGRAD), **types, pad_value=padding)
    if kind == "by Winograd":
        spec = winograd_schedule.winograd_spec(spec)
    data, weights = random(spec)
    chosen = suited(spec, micro)
    return Case(spec, chosen, data, (kernels.pack(spec, weights, chosen),), (), accumulators(spec, data, weights))


def _requantized(spec: ConvSpec, micro: MicroKernel) -> Case:
    integer = micro.accumulator == "int32"
    steps = (Bias(), Scale(), Activation("relu"), LAST) if integer else (Bias(), Activation("relu"), LAST)
    spec = dataclasses.replace(spec, epilogue=steps)
    data, weights = random(spec)
    bias = np.arange(-19, 19).astype(micro.accumulator) * (100 if integer else 1)
    scale = np.linspace(1e-4, 2e-4, 38).astype(np.float32)
    value = (accumulators(spec, data, weights) + bias) * (scale if integer else 1)
    tensors = (bias, scale) if integer else (bias,)
    wanted = quantized(np.maximum(value, 0), LAST.scale, LAST.zero_point, "int8")
    return Case(spec, micro, data, (kernels.pack(spec, weights, micro), *tensors), (), wanted)


def _matmul(spec: MatmulSpec, micro: MicroKernel) -> Case:
    generator, micro = np.random.default_rng(3), suited(spec, micro)
    kinds = np.dtype(spec.data_dtype), np.dtype(spec.weight_dtype)
    low = -100 if spec.data_dtype == "int8" else 0
    if spec.weight_dtype == "float32":
        data = generator.standard_normal((spec.batch, spec.m, spec.k), np.float32)
        right = generator.standard_normal((spec.batch, spec.k, spec.n), np.float32)
    else:
        data = generator.integers(low, 128 if low else 256, (spec.batch, spec.m, spec.k)).astype(kinds[0])
        least, most = (-NARROW // spec.narrow, NARROW // spec.narrow) if spec.narrow else (-128, 127)
        right = generator.integers(least, most + 1, (spec.batch, spec.k, spec.n)).astype(kinds[1])
    wanted = data.astype(float) @ right.astype(float)
    if spec.constant:
        return Case(spec, micro, data, (kernels.pack(spec, right[0], micro),), (), wanted)
    given = np.ascontiguousarray(right.swapaxes(1, 2)) if spec.transposed else right
    return Case(spec, micro, data, (), (given,), wanted)


def _pool(kind: str, micro: MicroKernel) -> Case:
    shape = {"kernel": (3, 3), "strides": (2, 2), "pads": (1, 1, 1, 1)}
    spec = PoolSpec(2, 9, 11, 21, **shape, function=POOLS[kind])
    data = np.random.default_rng(4).standard_normal((2, 9, 11, 21), np.float32)
    if micro.accumulator == "int32":
        last = Quantize(0.043, 20, micro.activation)
        types = {"data_dtype": micro.activation, "out_dtype": micro.activation}
        spec = dataclasses.replace(spec, **types, scale=0.05, zero_point=7, epilogue=(last,))
        info = np.iinfo(micro.activation)
        data = np.random.default_rng(5).integers(info.min, info.max + 1, data.shape).astype(micro.activation)
        wanted = quantized(pooled(spec, (data.astype(float) - 7) * 0.05), 0.043, 20, micro.activation)
        return Case(spec, micro, data, (), (), wanted)
    return Case(spec, micro, data, (), (), pooled(spec, data.astype(float)))


@functools.cache
def cases(micro: MicroKernel) -> dict[str, Case]:
    return {kind: case(kind, micro) for kind in kinds(micro)}


@functools.cache
def module(name: str) -> Any:
    """All kernels of a level, compiled together."""
    import tvm

    level = LEVELS[name]
    functions = {}
    for index, one in enumerate(cases(level.micro).values()):
        symbol = f"k{index}"
        functions[symbol] = kernels.build(one.spec, kernels.default_schedule(one.spec, one.micro), one.micro, symbol)
    with tvm.transform.PassContext(config={"tirx.disable_assert": True}):
        return tvm.tirx.build(tvm.IRModule(functions), tvm.target.Target(dict(level.tvm)))


@functools.cache
def results(name: str) -> dict[str, np.ndarray]:
    """What the processor, or its emulation, computes; all cases are one program."""
    return run(name, LEVELS[name].machine)


def run(name: str, machine: Machine) -> dict[str, np.ndarray]:
    level = LEVELS[name]
    buffers: dict[str, Buffer] = {}
    calls, feeds = [], {}
    for index, one in enumerate(cases(level.micro).values()):
        inputs = {f"{role}{index}": array.reshape(-1) for role, array in zip("xr", (one.data, *one.computed), strict=False)}
        constants = {f"c{index}_{at}": array.reshape(-1) for at, array in enumerate(one.constants)}
        size = one.wanted.size
        for key, array in inputs.items():
            buffers[key] = Buffer(key, array.dtype.name, array.shape, "input")
        for key, array in constants.items():
            buffers[key] = Buffer(key, array.dtype.name, array.shape, "constant", array)
        buffers[f"y{index}"] = Buffer(f"y{index}", one.spec.out_dtype, (size,), "output")
        data, *right = inputs
        calls.append(Call(f"k{index}", (data, *right, *constants, f"y{index}")))
        feeds |= inputs
    outputs = [key for key in buffers if key.startswith("y")]
    with tempfile.TemporaryDirectory() as folder:
        module(name).write_to_file(f"{folder}/kernels.o")
        objects = (Path(folder, "kernels.o").read_bytes(),)
        program = Program(
            "kinds", buffers, tuple(calls), tuple((key, key) for key in feeds), tuple((key, key) for key in outputs), objects
        )
        library = build_library(program, Path(folder) / "library", features=level.features)
        found = execute(library, machine, feeds)
    return {kind: found[f"y{index}"] for index, kind in enumerate(cases(level.micro))}


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, level in LEVELS.items() for kind in kinds(level.micro)])
def test_every_microkernel_computes_what_numpy_does(name: str, kind: str) -> None:
    level = LEVELS[name]
    reason = level.machine.missing(level.features)
    if reason:
        pytest.skip(reason)
    one = cases(level.micro)[kind]
    got, wanted = results(name)[kind].astype(float), one.wanted.reshape(-1)
    if one.spec.out_dtype == "int32":
        assert (got == wanted).all()
    elif one.spec.out_dtype == "float32":
        assert np.abs(got - wanted).max() < 2e-5 * np.abs(wanted).max()
    else:  # a product next to a tie may round to the other side
        assert np.abs(got - wanted).max() <= 1 and (got != wanted).mean() < 0.01 and len(np.unique(wanted)) > 5


LESSER = {
    "i8mm smmla": Machine("aarch64", "cortex-a76"),
    "dotprod sdot": Machine("aarch64", "cortex-a72"),
    "avx512-vnni vpdpbusd": Machine("x86_64", "Haswell"),
    "avx2 vpmaddwd": Machine("x86_64", "Nehalem"),
    "armv7 float": Machine("arm", "cortex-a9"),
}


@pytest.mark.parametrize("name", LESSER)
def test_a_processor_without_the_instructions_gets_an_error_code(name: str) -> None:
    machine = LESSER[name]
    if machine.missing():
        pytest.skip(machine.missing())
    with pytest.raises(RunError) as caught:
        run(name, machine)
    assert caught.value.status == 256 - 4  # HWOPT_ERROR_CPU, no illegal instruction


@pytest.mark.parametrize("name", LEVELS)
def test_every_microkernel_becomes_the_instruction_that_it_is_for(name: str) -> None:
    assert module(name).inspect_source("asm").count(f"\t{LEVELS[name].instruction}") > 50
