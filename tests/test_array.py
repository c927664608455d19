"""Artifacts of systolic targets: they run here, bit for bit as plain integer kernels do, and count what the cost model says."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import numpy as np
import pytest
from onnx import parser

import hwopt
from hwopt.analysis.workload import workloads
from hwopt.backends.tvm import kernels
from hwopt.backends.tvm.kernels import packed
from hwopt.backends.tvm.kernels.decode import Coding
from hwopt.backends.tvm.kernels.spec import ConvSpec, MatmulSpec
from hwopt.build import build
from hwopt.io.onnx import save
from hwopt.io.proto import from_model
from hwopt.ir import Graph
from hwopt.pipeline import Context, parse
from hwopt.plugins import find_passes, find_target
from hwopt.report.summary import summary
from hwopt.samples import Samples
from hwopt.target import Target
from targets._systolic import Systolic

ARRAY = find_target("systolic-16x16")


def small(**changes: int) -> Target:
    """The array with other scratchpads."""
    cost = dataclasses.replace(ARRAY.cost, **changes)  # type: ignore[type-var]
    assert isinstance(cost, Systolic)
    return dataclasses.replace(ARRAY, cost=cost, array=cost.array())


@functools.cache
def plain() -> Target:
    """This machine, with signed integers multiplied one by one."""
    host = find_target("host")
    assert ARRAY.array is not None
    return dataclasses.replace(host, microkernels={**host.microkernels, "int8": ARRAY.array.microkernel().others[0]})


@functools.cache
def layer(body: str, image: tuple[int, ...], weight: tuple[int, ...]) -> Graph:
    """One quantized layer with a bias and a ReLU."""
    random = np.random.default_rng(1)
    channels = weight[1] if "Gemm" in body else weight[0]
    dims = ",".join(map(str, image))
    values = {"w": random.standard_normal(weight), "b": random.standard_normal(channels)}
    stored = ", ".join(
        f"float[{','.join(map(str, v.shape))}] {k} = {{{','.join(f'{x:.5f}' for x in v.ravel())}}}" for k, v in values.items()
    )
    text = f'<ir_version: 8, opset_import: ["" : 17]> one (float[{dims}] x) => (float y) <{stored}> {{ h = {body} y = Relu(h) }}'
    graph = from_model(parser.parse_model(text))
    samples = Samples({"x": random.standard_normal((8, *image[1:])).astype(np.float32)})
    return parse("quantize", find_passes()).run(graph, Context(calibration=samples, target=ARRAY))


LAYERS = [
    ("Conv <pads = [1,1,1,1]> (x, w, b)", (1, 20, 9, 7), (37, 20, 3, 3)),  # neither side divides by 16
    ("Conv <pads = [3,3,3,3], strides = [2,2]> (x, w, b)", (1, 3, 21, 21), (16, 3, 7, 7)),
    ("Conv (x, w, b)", (1, 32, 8, 8), (48, 32, 1, 1)),
    ("Conv <strides = [2,2]> (x, w, b)", (1, 16, 9, 9), (20, 16, 1, 1)),
    ("Conv <group = 2, pads = [1,1,1,1]> (x, w, b)", (1, 24, 6, 6), (24, 12, 3, 3)),
    ("Conv <dilations = [2,2]> (x, w, b)", (1, 16, 9, 9), (16, 16, 3, 3)),
    ("Gemm (x, w, b)", (1, 100), (100, 33)),
]


@pytest.mark.parametrize("target", [ARRAY, small(output_bytes=16 * 4 * 2 * 5)], ids=["gemmini", "five sums"])
@pytest.mark.parametrize("what", LAYERS, ids=[one[0] for one in LAYERS])
def test_every_layer_computes_what_plain_integer_kernels_do(what: tuple, target: Target, tmp_path: Path) -> None:
    graph = layer(*what)
    feeds = {"x": np.random.default_rng(2).standard_normal(what[1]).astype(np.float32)}
    artifact = build(graph, target, 1, tmp_path / "array").artifact
    wanted = build(graph, plain(), 1, tmp_path / "plain").artifact.run(feeds)
    assert np.array_equal(artifact.run(feeds)["y"], wanted["y"])
    counted = artifact.simulation(feeds)
    assert counted is not None
    assert counted["kernels"] == 1
    assert counted["macs"] == sum(one.macs for one in workloads(graph))


@pytest.mark.parametrize("what", LAYERS[2:4], ids=["1x1", "strided"])
def test_the_model_in_c_counts_the_cycles_of_the_cost_model(what: tuple, tmp_path: Path) -> None:
    """Where channels divide by the array's sides; a ragged run takes a block of its own for every kernel row."""
    graph = layer(*what)
    work = next(one for one in workloads(graph) if one.macs)
    counted = build(graph, ARRAY, 1, tmp_path).artifact.simulation()
    cost = ARRAY.cost
    assert counted is not None
    assert isinstance(cost, Systolic)
    assert counted["array_cycles"] == cost.array_cycles(work)
    assert counted["array_cycles"] + counted["stall_cycles"] + counted["other_cycles"] == pytest.approx(
        cost.cycles(work) + cost.launch_cycles, rel=0.1
    )
    assert counted["dram_bytes"] == pytest.approx(cost.traffic(work).bytes, rel=0.1)
    assert counted["joules"] == pytest.approx(cost.joules(work), rel=0.25)


def test_what_the_array_cannot_take_runs_on_the_controller() -> None:
    """Depthwise layers, computed right sides and coded weights: the next micro-kernel takes them."""
    assert ARRAY.array is not None
    micro = ARRAY.array.microkernel()
    integers = {"data_dtype": "int8", "weight_dtype": "int8", "out_dtype": "int32"}
    depthwise = ConvSpec(1, 8, 8, 32, 32, (3, 3), groups=32, **integers)
    computed = MatmulSpec(2, 8, 8, 8, constant=False, **integers)
    for spec in (depthwise, computed):
        assert "array" in kernels.supports(spec, micro)
        assert kernels.suited(spec, micro) == micro.others[0]
    assert kernels.suited(MatmulSpec(1, 1, 8, 8, **integers), micro) == micro
    coded = packed.PackedSpec(1, 32, 32, Coding(4, 1), data_dtype="int8", out_dtype="int32")
    assert "array" in packed.supports(coded, micro)


def test_small_scratchpads_stall_and_cut_the_stream(tmp_path: Path) -> None:
    graph = layer(*LAYERS[0])
    sizes = {"roomy": ARRAY, "slow": small(dram_bytes_per_second=1e8), "cut": small(output_bytes=16 * 4 * 2 * 5)}
    counted = {name: build(graph, target, 1, tmp_path / name).artifact.simulation() for name, target in sizes.items()}
    roomy, slow, cut = (one or {} for one in counted.values())
    assert roomy["stall_cycles"] == 0 < slow["stall_cycles"]
    assert slow["array_cycles"] == roomy["array_cycles"] < cut["array_cycles"]


def test_counting_starts_again_for_every_simulation(tmp_path: Path) -> None:
    artifact = build(layer(*LAYERS[2]), ARRAY, 1, tmp_path).artifact
    assert artifact.simulation() == artifact.simulation()
    assert build(layer(*LAYERS[2]), plain(), 1, tmp_path / "plain").artifact.simulation() is None


def test_a_compiled_model_reports_cycles_and_energy_and_ships_the_model_of_the_array(tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    text = """<ir_version: 8, opset_import: ["" : 17]> net (float[1,16,8,8] x) => (float[1,32,8,8] y)
      { w = ConstantOfShape <value = float[1] {0.1}> (s) y = Conv <pads = [1,1,1,1]> (x, w) }"""
    graph = from_model(parser.parse_model(text.replace("{ w =", "{ s = Constant <value = int64[4] {32,16,3,3}> () w =")))
    save(graph, tmp_path / "net.onnx")
    data = {"x": random.standard_normal((8, 16, 8, 8)).astype(np.float32)}
    artifact = hwopt.compile(
        tmp_path / "net.onnx", out=tmp_path / "out", target="systolic-16x16", calibrate=data, passes="quantize{}"
    )
    assert {"hwopt_array.c", "hwopt_array.h"} <= set(artifact.manifest["files"])
    simulated = artifact.report["simulated"]["result"]
    assert simulated["kernels"] == 1
    assert simulated["joules"] > 0
    assert simulated["seconds"] == pytest.approx(artifact.report["result"]["latency_seconds"], rel=0.5)
    assert any("a model of the array in C" in note for note in artifact.report["notes"])
    assert "simulated float: no kernel runs on the array" in summary(artifact.report)
    assert f"simulated optimized: {simulated['array_cycles']:,} cycles on the array" in summary(artifact.report)
