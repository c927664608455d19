"""Kernels for Intel AMX, run in a child process: natively where the processor has it, else by an emulator of the instructions."""

from __future__ import annotations

import dataclasses
import itertools
import multiprocessing
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hwopt.backends.ort import Session
from hwopt.backends.tvm import kernels
from hwopt.backends.tvm.build import object_code
from hwopt.backends.tvm.kernels.amx_layout import layout_of
from hwopt.backends.tvm.kernels.amx_schedule import reason_for_vectors, tiles_of, with_prefetch
from hwopt.backends.tvm.kernels.geometry import geometry
from hwopt.backends.tvm.kernels.spec import Activation, Add, Bias, ConvSpec, MatmulSpec, Multiply, Quantize, Scale
from hwopt.backends.tvm.tune.space import Proposer, space_of
from hwopt.backends.tvm.tune.task import make_task
from hwopt.emit.cpu import check_code, host_features, request_tiles
from hwopt.io.onnx import save
from hwopt.pipeline import Context, parse
from hwopt.plugins import find_passes, find_target
from hwopt.samples import Samples
from hwopt.target import Workload
from targets import _isa_x86
from targets._roofline import Roofline
from targets._tiles import TilesOrVectors
from tests import _amx
from tests.test_compiler import pictures, small_net
from tests.test_kernels import SHAPES, accumulators, conv, random

AMX, VNNI = _isa_x86.AMX_INT8, _isa_x86.AVX512_VNNI


class Child:
    """A process that executes tile instructions. If it dies, the test fails and the next one gets a new process."""

    def __init__(self, emulator: str) -> None:
        self.emulator, self.pool = emulator, self._pool(emulator)

    @staticmethod
    def _pool(emulator: str) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _amx.start, (emulator,))

    def __call__(self, function: Any, *arguments: Any) -> Any:
        try:
            return self.pool.submit(function, *arguments).result(300)
        except BrokenExecutor:
            self.pool = self._pool(self.emulator)
            pytest.fail("the process died: a crash, or an instruction that real hardware refuses too")


@pytest.fixture(scope="session")
def child(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Child]:
    if platform.machine() not in ("x86_64", "AMD64") or not host_features() >= _amx.NEEDED:
        pytest.skip("the emulator runs tile instructions only: the processor must have AVX-512 with VNNI")
    path = ""
    if not request_tiles():
        if not shutil.which("cc"):
            pytest.skip("no AMX, and no C compiler for its emulator")
        path = str(tmp_path_factory.mktemp("amx") / "emulator.so")
        source = Path(__file__).with_name("amx_emulator.c")
        flags = ["-O3", "-march=native", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
        subprocess.run(["cc", *flags, "-o", path, str(source), "-lm"], check=True)
    found = Child(path)
    yield found
    found.pool.shutdown()


def exact(child: Child, spec: Any, schedule: Any = None, micro: Any = AMX) -> np.ndarray:
    """Asserts that the tiles' int32 results are numpy's; returns the counts."""
    data, weights = random(spec)
    found, counts = child(_amx.run, spec, micro, data, weights, (), schedule)
    np.testing.assert_array_equal(found, accumulators(spec, data, weights).reshape(-1))
    return counts


@pytest.mark.parametrize("shape", [one for one in SHAPES if one.get("groups", 1) != one["channels"]], ids=str)
def test_convolutions_of_every_kind_are_exact(child, shape):
    given = dict(shape)
    spec = conv(*(given.pop(key) for key in ("height", "width", "channels", "out", "kernel")), True, pad_value=7, **given)
    if spec.out_height * spec.out_width == 1:
        pytest.skip("one position: vectors compute it")
    exact(child, spec)


@pytest.mark.parametrize("channels", [1, 3, 4, 31, 63, 64, 65, 96, 127, 128, 130])
def test_channels_that_fill_no_tile_are_exact(child, channels):
    exact(child, conv(4, 6, channels, 20, (1, 1), True))
    exact(child, conv(4, 6, channels, 20, (3, 3), True, pads=(1, 1, 1, 1), pad_value=3))


@pytest.mark.parametrize("rows", [2, 15, 16, 17, 31, 33, 49, 100])
def test_matmuls_of_any_height_are_exact_and_read_nothing_else(child, rows):
    generator = np.random.default_rng(rows)
    spec = MatmulSpec(1, rows, 37, 70, data_dtype="uint8", weight_dtype="int8", out_dtype="int32")
    data = generator.integers(0, 256, (rows, 70)).astype(np.uint8)
    weights = generator.integers(-128, 128, (70, 37)).astype(np.int8)
    found, _ = child(_amx.run, spec, AMX, data, weights)
    np.testing.assert_array_equal(found.reshape(rows, 37), data.astype(int) @ weights.astype(int))


def test_batches_and_tasks_for_several_cores_are_exact(child):
    for spec in (
        conv(9, 9, 64, 48, (3, 3), True, pads=(1, 1, 1, 1), batch=8),
        conv(30, 30, 64, 64, (3, 3), True, pads=(1, 1, 1, 1)),
        conv(7, 7, 256, 128, (3, 3), True, pads=(1, 1, 1, 1)),
        conv(40, 40, 64, 64, (1, 1), True),
    ):
        schedule = kernels.default_schedule(spec, AMX, 3)
        shape = geometry(spec)
        assert spec.macs < 4e6 or schedule.tasks(shape, shape.vectors(16)) >= 3
        exact(child, spec, schedule)


def test_every_block_of_tiles_is_exact(child):
    for spec in (conv(9, 7, 40, 70, (3, 3), True, pads=(1, 1, 1, 1), pad_value=9), conv(10, 10, 40, 70, (1, 1), True)):
        shape = geometry(spec)
        tiles = list(tiles_of(shape, AMX))
        assert tiles[0] == (1, 32, 2)
        assert {(across // 16, vectors) for _, across, vectors in tiles} >= {(1, 1), (1, 3), (3, 1), (1, 2), (2, 1)}
        for _, columns, vectors in tiles:
            schedule = dataclasses.replace(kernels.default_schedule(spec, AMX), tile_columns=columns, vectors=vectors)
            blocks = dataclasses.replace(schedule, block_rows=4, block_columns=3 * columns, block_tiles=1)
            exact(child, spec, blocks if shape.rows == 1 else dataclasses.replace(blocks, block_columns=7 + columns))


def test_schedules_that_tuning_proposes_are_exact(child):
    host = find_target("host")
    for spec in (conv(12, 10, 64, 48, (3, 3), True, pads=(1, 1, 1, 1)), conv(9, 9, 96, 48, (1, 1), True)):
        space = space_of(make_task(spec, AMX, host, 2))
        assert space.schedule(space.point(space.task.default)) == space.task.default
        for schedule in Proposer(space, 0).propose([], 6):
            exact(child, spec, schedule)


@st.composite
def small_convolutions(draw: st.DrawFn) -> ConvSpec:
    kernel = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    strides, dilations = (draw(st.tuples(st.integers(1, 3), st.integers(1, 2))) for _ in range(2))
    pads = draw(st.tuples(*(st.integers(0, 2) for _ in range(4))))
    least = [(kernel[axis] - 1) * dilations[axis] + 1 for axis in (0, 1)]
    size = [max(1, least[axis] - pads[axis] - pads[axis + 2]) + draw(st.integers(0, 9)) for axis in (0, 1)]
    groups = draw(st.sampled_from((1, 1, 2)))
    channels, out = groups * draw(st.integers(2, 70)), groups * draw(st.integers(2, 40))
    more = {"strides": strides, "dilations": dilations, "pads": pads, "groups": groups, "batch": draw(st.integers(1, 2))}
    return conv(size[0], size[1], channels, out, kernel, True, pad_value=11, **more)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(small_convolutions(), st.sampled_from(((16, 1), (32, 2), (16, 3), (48, 1))), st.integers(1, 3))
def test_small_convolutions_are_exact(child, spec, tile, rows):
    shape = geometry(spec)
    if (1, *tile) not in set(tiles_of(shape, AMX)) or spec.out_height * spec.out_width == 1:
        return
    schedule = dataclasses.replace(kernels.default_schedule(spec, AMX), tile_columns=tile[0], vectors=tile[1], block_rows=rows)
    exact(child, spec, with_prefetch(schedule, shape, AMX))


CHAINS = {
    "relu": (Activation("relu"),),
    "residual then relu": (Add("uint8", 0.05, 100), Activation("relu")),
    "gated": (Add(), Multiply("full"), Activation("clip", (0.0, 6.0))),
    "per channel and image": (Multiply("channels"), Activation("leaky_relu", (0.2,)), Multiply("image")),
    "hard swish": (Activation("hard_swish"),),
}
EPILOGUES = [
    ("relu", (3, 3)),
    ("residual then relu", (3, 3)),
    ("residual then relu", (1, 1)),
    ("gated", (1, 1)),
    ("per channel and image", (1, 1)),
    ("hard swish", (3, 3)),
]


@pytest.mark.parametrize(("chain", "kernel"), EPILOGUES, ids=str)
def test_epilogues_equal_those_of_the_vector_kernels(child, chain, kernel):
    """33 positions in steps of 32: the epilogue runs beside the next step's products, and after the last one's."""
    steps = (Bias(), Scale(), *CHAINS[chain], Quantize(0.07, 10, "uint8"))
    pads = (1, 1, 1, 1) if kernel == (3, 3) else (0, 0, 0, 0)
    spec = conv(11, 9, 70, 41, kernel, True, pads=pads, pad_value=3, batch=2, epilogue=steps)
    spec = dataclasses.replace(spec, out_dtype="uint8")
    generator, count = np.random.default_rng(1), 2 * spec.out_height * spec.out_width * 41
    tensors: list[np.ndarray] = []
    for step in steps:
        if isinstance(step, Bias):
            tensors.append(generator.integers(-5000, 5000, 41).astype(np.int32))
        elif isinstance(step, Scale):
            tensors.append(generator.uniform(1e-5, 2e-5, 41).astype(np.float32))
        elif isinstance(step, Multiply):
            tensors.append(generator.random({"channels": 41, "image": 82, "full": count}[step.over], np.float32) + 0.5)
        elif isinstance(step, Add):
            tensors.append(generator.integers(0, 255, count).astype(step.dtype))
    data, weights = random(spec)
    found, _ = child(_amx.run, spec, AMX, data, weights, tuple(tensors))
    wanted, _ = child(_amx.run, spec, VNNI, data, weights, tuple(tensors))
    np.testing.assert_array_equal(found, wanted)
    assert len(np.unique(wanted)) > 20


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3)])
def test_bfloat16_is_within_its_precision(child, kernel):
    if "avx512_bf16" not in host_features():
        pytest.skip("the processor has no bfloat16 conversions")
    import ml_dtypes

    kinds = {"data_dtype": "bfloat16", "weight_dtype": "bfloat16", "out_dtype": "float32"}
    spec = ConvSpec(1, 9, 8, 70, 33, kernel, strides=(2, 1), pads=(1, 1, 1, 1), **kinds, epilogue=(Bias(),))
    plain = dataclasses.replace(spec, data_dtype="float32", weight_dtype="float32")
    data, weights = (one.astype(ml_dtypes.bfloat16) for one in random(plain))
    bias = np.linspace(-1, 1, 33, dtype=np.float32)
    found, _ = child(_amx.run, spec, _isa_x86.AMX_BF16, data, weights, (bias,))
    wanted = accumulators(plain, data.astype(np.float32), weights.astype(np.float32)) + bias
    np.testing.assert_allclose(found, wanted.reshape(-1), atol=1e-5 * np.abs(wanted).max())


PRODUCTS = [(3, 20, 40, 32, False), (2, 33, 17, 128, True), (2, 50, 20, 30, True), (12, 16, 70, 64, False)]


@pytest.mark.parametrize(("batch", "m", "n", "k", "transposed"), PRODUCTS)
def test_matmuls_of_two_computed_values_are_exact(child, batch, m, n, k, transposed):
    generator = np.random.default_rng(m)
    kinds = {"data_dtype": "uint8", "weight_dtype": "int8", "out_dtype": "int32"}
    spec = MatmulSpec(batch, m, n, k, constant=False, transposed=transposed, **kinds)
    left = generator.integers(0, 256, (batch, m, k)).astype(np.uint8)
    right = generator.integers(-128, 128, (batch, n, k) if transposed else (batch, k, n)).astype(np.int8)
    wanted = left.astype(int) @ (right.swapaxes(1, 2) if transposed else right).astype(int)
    for cores in (1, 3):
        schedule = kernels.default_schedule(spec, AMX, cores)
        if cores == 3:
            schedule = dataclasses.replace(schedule, block_tiles=1, parallel=True)
        found, counts = child(_amx.run, spec, AMX, left, right, (), schedule)
        np.testing.assert_array_equal(found.reshape(wanted.shape), wanted)
        assert not child.emulator or counts[3] > 0


def test_bfloat16_attention_runs_on_tiles(child):
    if "avx512_bf16" not in host_features():
        pytest.skip("the processor has no bfloat16 conversions")
    import ml_dtypes

    kinds = {"data_dtype": "bfloat16", "weight_dtype": "bfloat16", "out_dtype": "float32"}
    spec = MatmulSpec(4, 64, 64, 32, constant=False, transposed=True, **kinds)
    assert kernels.suited(spec, _isa_x86.AMX_BF16) is _isa_x86.AMX_BF16
    generator = np.random.default_rng(0)
    left, right = (generator.standard_normal((4, 64, 32), np.float32).astype(ml_dtypes.bfloat16) for _ in range(2))
    found, _ = child(_amx.run, spec, _isa_x86.AMX_BF16, left, right)
    wanted = left.astype(np.float32) @ right.astype(np.float32).swapaxes(1, 2)
    np.testing.assert_allclose(found, wanted.reshape(-1), atol=1e-5 * np.abs(wanted).max())


def test_a_product_needs_one_tile_load(child):
    """Two by two tiles: loads take half of the time that products do. Counted as they are executed."""
    spec = conv(16, 16, 128, 64, (1, 1), True)
    schedule = dataclasses.replace(kernels.default_schedule(spec, AMX), tile_columns=32, vectors=2)
    configured, loaded, stored, products, rows = exact(child, spec, schedule)
    if configured:  # on real hardware nobody counts
        assert (configured, loaded, stored) == (1, products, 16 * 4)
        assert rows * 16 * 64 == spec.macs


def test_tiles_lie_between_few_other_instructions(tmp_path):
    """Between two products of the same step stand at most one address, one prefetch and two loads of tiles."""
    spec = dataclasses.replace(
        conv(28, 28, 128, 64, (3, 3), True, pads=(1, 1, 1, 1), epilogue=(Bias(), Scale(), Quantize(0.1, 3, "uint8"))),
        out_dtype="uint8",
    )
    schedule = dataclasses.replace(kernels.default_schedule(spec, AMX), tile_columns=32, vectors=2)
    text = assembly(spec, schedule, tmp_path)
    products = [index for index, line in enumerate(text) if line.startswith("tdpbusd")]
    between = [text[first + 1 : last] for first, last in itertools.pairwise(products)]
    plain = [lines for lines in between if not any(re.match(r"v|tilestored|j|tilezero|\.L", line) for line in lines)]
    assert len(plain) > 20
    assert max(len(lines) for lines in plain) <= 6
    assert all(sum(line.startswith("tileloadd") for line in lines) <= 2 for lines in plain)
    assert any(re.match("vcvtdq2ps", line) for lines in between for line in lines)  # the epilogue works beside the products


def assembly(spec: Any, schedule: Any, folder: Path) -> list[str]:
    """The instructions of the kernel."""
    if not shutil.which("objdump"):
        pytest.skip("no objdump")
    path = folder / "kernel.o"
    path.write_bytes(object_code({"kernel": kernels.build(spec, schedule, AMX, "kernel")}, _amx.description(), "test"))
    command = ["objdump", "-d", "--no-show-raw-insn", str(path)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return [line.split("\t", 1)[1].strip() for line in lines if "\t" in line]


def test_weights_that_are_used_once_pass_the_first_cache_by(child, tmp_path):
    once, often = conv(4, 8, 256, 64, (1, 1), True), conv(16, 8, 256, 64, (1, 1), True)
    for spec, name in ((once, "tileloaddt1"), (often, "tileloadd")):
        exact(child, spec)
        text = assembly(spec, kernels.default_schedule(spec, AMX), tmp_path)
        found = {line.split()[0] for line in text if line.startswith("tileload") and re.search("%tmm[67]", line)}
        assert found == {name}


def test_workspace_is_as_large_as_tiles_need():
    """TVM sees only the first element of a tile that it reads or writes; it must not cut off the rest."""
    import tvm

    spec = conv(13, 5, 33, 49, (1, 1), True, strides=(2, 3), pads=(1, 1, 1, 1))
    function = kernels.build(spec, kernels.default_schedule(spec, AMX), AMX, "kernel")
    wanted = [int(size) for size in re.findall(r"(?:scratch|staged) = T.alloc_buffer\(\((\d+),\)", str(function))]
    library = tvm.tirx.build(tvm.IRModule({"kernel": function}), tvm.target.Target(_amx.description()))
    found = re.findall(r"%(?:scratch|staged)\S* = tail call ptr .*i64 (\d+)", library.inspect_source("ll"))
    assert sorted(map(int, found)) == sorted([4 * wanted[0], wanted[1]])


def test_vectors_compute_what_would_not_fill_tiles():
    kinds = {"data_dtype": "uint8", "weight_dtype": "int8", "out_dtype": "int32"}
    assert kernels.suited(conv(28, 28, 64, 64, (3, 3), True, groups=64), AMX) is VNNI
    assert kernels.suited(MatmulSpec(1, 1, 1000, 512, **kinds), AMX) is VNNI
    assert kernels.suited(conv(28, 28, 8, 8, (1, 1), True), AMX) is VNNI
    assert kernels.suited(conv(28, 28, 64, 64, (3, 3), True, pads=(1, 1, 1, 1)), AMX) is AMX
    assert kernels.suited(conv(224, 224, 3, 64, (7, 7), True, strides=(2, 2), pads=(3, 3, 3, 3)), AMX) is AMX
    assert kernels.suited(MatmulSpec(1, 128, 1536, 384, **kinds), AMX) is AMX
    assert "vectors take" in reason_for_vectors(geometry(conv(28, 28, 8, 8, (1, 1), True)), AMX)


def test_rows_of_an_image_are_joined_where_that_wastes_little():
    padded = conv(14, 14, 64, 64, (3, 3), True, pads=(1, 1, 1, 1))
    assert layout_of(geometry(padded), AMX).pitch == 15  # the padding on the right is the next row's on the left
    assert not layout_of(geometry(conv(16, 16, 64, 64, (3, 3), True)), AMX).staged
    assert layout_of(geometry(conv(4, 4, 64, 64, (3, 3), True)), AMX).staged  # half of the positions would be thrown away
    assert layout_of(geometry(conv(15, 15, 64, 64, (1, 1), True, strides=(2, 2))), AMX).pitch == 8


def test_targets_with_amx_state_what_they_need():
    needed = find_target("sapphire-rapids").features
    assert {"amx_tile", "amx_int8", "amx_bf16", "avx512_vnni"} <= set(needed)
    assert "0x1023, 18" in check_code(needed, "x86_64")
    without = _isa_x86.microkernels(_amx.FLAGS - {"amx_tile"})
    assert without["int8"] == VNNI
    assert without["bfloat16"] == _isa_x86.AVX512_BF16


def test_prices_are_those_of_the_faster_unit():
    model = find_target("sapphire-rapids").cost
    assert isinstance(model, TilesOrVectors)
    large = Workload("c", "conv", "int8", m=3136, n=64, k=576, taps=9)
    narrow = Workload("n", "conv", "int8", m=3136, n=1, k=4)
    deep = Workload("d", "depthwise", "int8", m=3136, n=1, k=9, groups=64, taps=9)
    vectors: Roofline = model.vectors
    assert model.estimate(large, 1).seconds < 0.3 * vectors.estimate(large, 1).seconds
    assert model.estimate(narrow, 1) == vectors.estimate(narrow, 1)
    assert model.estimate(deep, 1) == vectors.estimate(deep, 1)


def test_whole_quantized_model_equals_onnx_runtime_within_a_step(child, tmp_path):
    graph = parse("quantize", find_passes()).run(small_net(), Context(calibration=Samples(pictures(16, 1)), target=_amx.target()))
    save(graph, tmp_path / "model.onnx")
    image = pictures(1, 7)
    found, counts = child(_amx.run_model, tmp_path / "model.onnx", image)
    wanted = Session(graph).run(image)
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, atol=0.02 * np.abs(value).max())
    assert not child.emulator or counts[3] > 0


def test_peak_benchmark_multiplies_tiles_only(child):
    counts = child(_amx.peak, AMX, 10)
    assert not child.emulator or counts.tolist() == [1, 8, 4, 40, 640]
