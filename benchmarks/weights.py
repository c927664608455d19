"""Suite `weights`: products of few rows with small weights, one thread: float, 8 and 4 bits, palettes; against MatMulNBits.

A chain of square layers stands for a language model: together they are larger than the last-level cache, so that every run reads
them from main memory. Shares are of the bandwidth at which one core reads a large array.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
import onnxruntime

from benchmarks.layout import Row, lower_is_better, result
from hwopt.backends.ort import run as reference
from hwopt.backends.tvm.build import compile_program
from hwopt.backends.tvm.run import Loaded
from hwopt.ir import Graph, Node, TensorType, frozen, infer_types
from hwopt.measure import interleaved, onnxruntime_runner
from hwopt.pipeline import Context, parse
from hwopt.plugins import find_passes, find_target

CASES = {  # rows, inputs = outputs, layers
    "llm 4096x4096 x4": (1, 4096, 4),
    "llm 2048x2048 x16": (1, 2048, 16),
    "llm 4 rows 2048x2048 x16": (4, 2048, 16),
    "mlp 512x512 x3": (1, 512, 3),
    "minilm 384x384 x24": (1, 384, 24),
}
FORMS = {
    "f32": "",
    "int8": "quantize-weights",
    "int4 g32": "quantize-weights{bits=4,group=32}",
    "palette 4": "share-weights{bits=4}",
}
GROUP = 32
READ = 1 << 28  # bytes


def run(quick: bool = False) -> dict[str, Any]:
    """Times of every form, side by side; the ratio of a form is ONNX Runtime's time with 4 bits over ours."""
    bandwidth = bytes_per_second()
    rows = [Row("one core", "read_bandwidth", "B/s", bandwidth, {}, None)]
    summary: dict[str, float] = {}
    cases = list(CASES.items())[-2:] if quick else list(CASES.items())
    for name, (m, size, layers) in cases:
        found, faster = measured(name, chain(m, size, layers), bandwidth, 5 if quick else 15)
        rows += found
        summary |= {f"{name} {form} vs f32": ratio for form, ratio in faster.items()}
    return result("weights", rows, summary)


def chain(m: int, size: int, layers: int) -> Graph:
    """layers x (MatMul, Relu), of [m, size]."""
    generator = np.random.default_rng(0)
    weights = {f"w{i}": generator.standard_normal((size, size), np.float32) * np.float32(size**-0.5) for i in range(layers)}
    nodes, value = [], "x"
    for index in range(layers):
        nodes.append(Node("MatMul", (value, f"w{index}"), (f"h{index}",), f"fc{index}"))
        nodes.append(Node("Relu", (f"h{index}",), (f"r{index}",), f"relu{index}"))
        value = f"r{index}"
    types = MappingProxyType({"x": TensorType("float32", (m, size))})
    params = MappingProxyType({name: frozen(array) for name, array in weights.items()})
    return infer_types(Graph("chain", ("x",), (value,), tuple(nodes), types, params, {"": 21}))


def measured(name: str, graph: Graph, bandwidth: float, rounds: int) -> tuple[list[Row], dict[str, float]]:
    """Rows of one chain, and how many times faster than our float every form is."""
    target = find_target("host")
    feeds = {"x": np.random.default_rng(1).standard_normal(graph.tensor("x").dims, np.float32)}
    runners: dict[str, Callable[[], object]] = {}
    sizes: dict[str, int] = {}
    for form, text in FORMS.items():
        changed = parse(text, find_passes()).run(graph, Context(target=target)) if text else graph
        program = compile_program(changed, target)
        loaded = Loaded(program)
        _check(name, form, loaded.run(feeds), reference(changed, feeds))
        sizes[form] = sum(one.data.nbytes for one in program.buffers.values() if one.data is not None)
        runners[form] = lambda loaded=loaded: loaded.times(1)
    runners["onnxruntime f32"] = onnxruntime_runner(graph, feeds, 1)
    runners["onnxruntime int4"] = n_bits_runner(graph, feeds)
    times = {key: one.median for key, one in interleaved(runners, rounds).items()}
    rows = []
    for form in FORMS:
        peers = {"onnxruntime": times["onnxruntime f32" if form == "f32" else "onnxruntime int4"]} if form != "int8" else {}
        rows.append(lower_is_better(f"{name} {form}", "latency", "s", times[form], peers))
        rows.append(Row(f"{name} {form}", "bandwidth_share", "1", sizes[form] / times[form] / bandwidth, {}, None))
    return rows, {form: times["f32"] / times[form] for form in FORMS if form != "f32"}


def _check(name: str, form: str, found: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray]) -> None:
    for key, array in wanted.items():
        if np.abs(found[key] - array).max() > 1e-3 * np.abs(array).max():
            raise ValueError(f"{name} {form}: {key} is not what ONNX Runtime computes")


def n_bits_runner(graph: Graph, feeds: Mapping[str, np.ndarray]) -> Callable[[], object]:
    """ONNX Runtime's MatMulNBits: 4 bits in groups, float activations (accuracy_level 0)."""
    nodes, tensors = [], []
    for node in graph.nodes:
        if node.op != "MatMul":
            nodes.append(node.proto)
            continue
        packed, scales = n_bits(graph.params[node.inputs[1]])
        names = [f"{node.name}_q", f"{node.name}_s"]
        tensors += [onnx.numpy_helper.from_array(array, label) for array, label in zip((packed, scales), names, strict=True)]
        k, n = graph.params[node.inputs[1]].shape
        nodes.append(
            onnx.helper.make_node(
                "MatMulNBits",
                [node.inputs[0], *names],
                [node.output],
                node.name,
                domain="com.microsoft",
                K=k,
                N=n,
                bits=4,
                block_size=GROUP,
                accuracy_level=0,
            )
        )
    ends = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, graph.tensor(name).dims)
        for name in ("x", graph.outputs[0])
    ]
    body = onnx.helper.make_graph(nodes, "chain", ends[:1], ends[1:], tensors)
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(body, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, dict(feeds))


def n_bits(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[k, n] -> uint8 [n, k / group, group / 2] with zero point 8, and scales [n * k / group]."""
    blocks = weight.T.reshape(weight.shape[1], -1, GROUP)
    scales = (np.abs(blocks).max(2) / 7).astype(np.float32)
    steps = (np.clip(np.rint(blocks / scales[:, :, None]), -7, 7) + 8).astype(np.uint8)
    return steps[:, :, ::2] | steps[:, :, 1::2] << 4, scales.reshape(-1)


def bytes_per_second() -> float:
    """What one core reads of a large array, the best of five."""
    array, best = np.ones(READ // 4, np.float32), float("inf")
    for _ in range(5):
        started = time.perf_counter()
        array.dot(array)
        best = min(best, time.perf_counter() - started)
    return READ / best
