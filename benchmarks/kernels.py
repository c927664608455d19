"""Suite `kernels`: every distinct convolution and matmul of the zoo with what is fused behind it, against other runtimes.

Each kernel is cut out of its model as a graph of its own, which all runtimes run: ours by TVM's runtime, the others under their
own profilers. Layout changes at the borders, which a whole model does not have, count for nobody.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import MappingProxyType
from typing import Any

import numpy as np

from benchmarks.layer_shares import units
from benchmarks.layout import Row, lower_is_better, result
from benchmarks.models import (
    PEAK,
    QUICK_ROUNDS,
    ROUNDS,
    Findings,
    alone,
    chosen_names,
    compared,
    geometric_mean,
    machine_peaks,
    quantized,
)
from benchmarks.peers import openvino_request, session_options
from benchmarks.zoo import ZOO, Case, Missing
from hwopt.analysis.regions import Region, constant_nodes
from hwopt.analysis.workload import kernels
from hwopt.errors import HwoptError
from hwopt.ir import Graph, numpy_dtype
from hwopt.target import Target, Workload

KINDS = ("conv", "depthwise", "matmul")
DTYPES = ("f32", "int8")
BORDERS = ("Reorder", "ReorderInput", "ReorderOutput", "Transpose", "Parameter", "Input", "Result", "Output", "Constant")
SLOWEST = 5  # kernels of each model that are no convolution and no matmul
Timer = Callable[[], float]  # one run; seconds inside the kernels


@dataclass(frozen=True)
class Layer:
    """One kernel as a graph of its own, with the models that have it."""

    name: str
    graph: Graph
    work: Workload
    dtype: str
    models: Mapping[str, int]

    @property
    def label(self) -> str:
        uses = "+".join(f"{name}*{count}" for name, count in self.models.items())
        size = f"m{self.work.m} n{self.work.n} k{self.work.k}" + (f" g{self.work.groups}" if self.work.groups > 1 else "")
        return f"{self.name} {self.work.kind} {size} t{self.work.taps} {self.dtype} {uses}"


def run(threads: int | None = None, models: str | None = None, dtypes: str | None = None, quick: bool = False) -> dict[str, Any]:
    """All distinct layers of the models at batch 1, slowest model by model; `quick` measures few turns."""
    count, rounds = threads or 1, QUICK_ROUNDS if quick else ROUNDS
    peak = alone(machine_peaks, (), 1)
    arguments = (chosen_names(models, ZOO) or tuple(ZOO), chosen_names(dtypes, PEAK) or DTYPES, count, rounds, peak)
    found = alone(measure, arguments, count)
    if isinstance(found, str):
        found = Findings(failures=[found])
    return result("kernels", found.rows, summary(found, count), notes=[*found.notes, *found.failures])


def measure(models: Sequence[str], dtypes: Sequence[str], threads: int, rounds: int, peaks: Mapping[str, float]) -> Findings:
    found = Findings()
    layers, target = _collected(models, dtypes, threads, found)
    for layer in layers:
        try:
            found.add(measure_layer(layer, target, threads, rounds, peaks))
        except HwoptError as error:
            found.failures.append(f"{layer.label}: {error}")
    return found


def _collected(models: Sequence[str], dtypes: Sequence[str], threads: int, found: Findings) -> tuple[list[Layer], Target]:
    """The layers of all models, equal ones once; what else takes time in a model becomes rows at once."""
    from hwopt.job import prepare, quiet
    from hwopt.plugins import find_target

    layers: dict[tuple, Layer] = {}
    for name in models:
        try:
            case: Case = ZOO[name](1)
        except Missing as error:
            found.notes.append(f"{name}: skipped: {error}")
            continue
        data = dict(case.calibrate)
        job = prepare(case.model, "host", case.shapes, None, data, data, None, "none", 1, 0, quiet)
        for dtype in dtypes:
            graph = quantized(job) if dtype == "int8" else job.graph
            found.rows += rest(f"{name} {dtype}", graph, case.feeds, job.target, threads)
            for key, layer in layers_of(graph, name, dtype):
                known = layers.setdefault(key, layer)
                counts = Counter(known.models) if known is not layer else Counter()
                layers[key] = dataclasses.replace(known, models=counts + Counter({name: 1}))
    return list(layers.values()), find_target("host")


def rest(label: str, graph: Graph, feeds: Mapping[str, np.ndarray], target: Target, threads: int) -> list[Row]:
    """The share of a model's time outside of its convolutions and matmuls, and the slowest kernels there."""
    from hwopt.backends.tvm.build import compile_program
    from hwopt.backends.tvm.run import Loaded

    loaded = Loaded(compile_program(graph, target, threads, "model"))
    loaded.run(feeds)
    calls = loaded.times(10)
    layers = {region.name for region, work in kernels(graph) if region.kind in KINDS}
    others = sorted(((seconds, name) for seconds, name in calls if name not in layers), reverse=True)
    share = sum(seconds for seconds, _ in others) / sum(seconds for seconds, _ in calls)
    slowest = [Row(f"{label} {name}", "latency", "s", seconds, {}, None) for seconds, name in others[:SLOWEST]]
    return [Row(label, "share outside of layers", "1", share, {}, None), *slowest]


def layers_of(graph: Graph, model: str, dtype: str) -> Iterator[tuple[tuple, Layer]]:
    """Every convolution and matmul of this precision with what tells it from others."""
    constant = constant_nodes(graph)
    for region, work in kernels(graph):
        if region.kind in KINDS and region.integer == (dtype == "int8"):
            alone_ = cut(graph, region, constant)
            kinds = tuple(str(alone_.tensor(value)) for value in (*alone_.inputs, *alone_.outputs))
            key = (dtype, work.kind, work.m, work.n, work.k, work.groups, kinds, tuple(node.op for node in alone_.nodes))
            yield key, Layer(region.name, alone_, work, dtype, {model: 1})


def cut(graph: Graph, region: Region, constant: frozenset[str]) -> Graph:
    """The region as a graph; dequantizations and constants that it shares with others come along."""
    members = {node.name: node for node in region.nodes}
    waiting = list(region.nodes)
    while waiting:
        for value in waiting.pop().reads:
            node = graph.producer.get(value)
            if node is not None and node.name not in members and (node.op == "DequantizeLinear" or node.name in constant):
                members[node.name] = node
                waiting.append(node)
    nodes = tuple(node for node in graph.nodes if node.name in members)
    made = {value for node in nodes for value in node.outputs}
    read = dict.fromkeys(value for node in nodes for value in node.reads)
    params = {value: graph.params[value] for value in read if value in graph.params}
    inputs = tuple(value for value in read if value not in made and value not in params)
    types = {value: graph.types[value] for value in (*read, *made) if value in graph.types}
    return dataclasses.replace(
        graph, name="layer", inputs=inputs, outputs=region.outputs, nodes=nodes, params=MappingProxyType(params),
        types=MappingProxyType(types),
    )  # fmt: skip


def measure_layer(layer: Layer, target: Target, threads: int, rounds: int, peaks: Mapping[str, float]) -> Findings:
    from hwopt.backends.ort import Session
    from hwopt.backends.tvm.build import compile_program
    from hwopt.backends.tvm.run import Loaded

    feeds = {name: _random(layer.graph, name) for name in layer.graph.inputs}
    loaded = Loaded(compile_program(layer.graph, target, threads, "layer"))
    rows, wrong = compared(layer.label, layer.dtype, loaded.run(feeds), Session(layer.graph).run(feeds))
    if wrong:
        return Findings(rows, failures=[f"{layer.label}: {wrong}"])
    timers, notes = _timers(layer, loaded, feeds, threads)
    with tempfile.TemporaryDirectory() as folder:
        times = _times(timers, rounds, OnnxRuntime(layer.graph, feeds, threads, Path(folder)))
    ours = times.pop("hwopt")
    rows.insert(0, lower_is_better(layer.label, "latency", "s", ours, times))
    peak = peaks.get(PEAK[layer.dtype]) if isinstance(peaks, Mapping) else None
    if peak:
        rows.append(Row(layer.label, "peak_share", "1", 2 * layer.work.macs / ours / (peak * threads), {}, None))
    return Findings(rows, notes)


def _random(graph: Graph, name: str) -> np.ndarray:
    random, kind = np.random.default_rng(0), graph.tensor(name)
    dtype, shape = numpy_dtype(kind.dtype), tuple(int(dim or 1) for dim in kind.shape or ())
    if np.issubdtype(dtype, np.integer):
        limits = np.iinfo(dtype)
        return random.integers(max(limits.min, -128), min(limits.max, 255) + 1, shape).astype(dtype)
    return random.standard_normal(shape).astype(dtype)


def _timers(layer: Layer, loaded: Any, feeds: Mapping[str, np.ndarray], threads: int) -> tuple[dict[str, Timer], list[str]]:
    timers: dict[str, Timer] = {"hwopt": lambda: _inside(loaded.times(1))}
    try:
        timers["openvino"] = openvino_timer(layer.graph, feeds, threads)
        timers["openvino"]()
    except Exception as error:  # OpenVINO raises kinds of its own
        timers.pop("openvino", None)
        return timers, [f"{layer.label}: openvino: {type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"]
    return timers, []


def _inside(calls: Sequence[tuple[float, str]]) -> float:
    """Without the layout changes at the borders."""
    return sum(seconds for seconds, label in calls if "transpose" not in label)


def _times(timers: Mapping[str, Timer], rounds: int, runtime: OnnxRuntime) -> dict[str, float]:
    """Median seconds of each in turns, each turn after an untimed run."""
    found: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(rounds):
        for name, timer in timers.items():
            timer()
            found[name].append(timer())
        runtime.run()
        runtime.run()
    return {name: median(values) for name, values in found.items()} | {"onnxruntime": runtime.seconds()}


def openvino_timer(graph: Graph, feeds: Mapping[str, np.ndarray], threads: int) -> Timer:
    from hwopt.io.proto import to_model

    model = to_model(graph).SerializeToString()
    request = openvino_request(feeds, model, threads, "f32", PERF_COUNT=True)

    def run() -> float:
        request.infer(share_outputs=True)
        counted = [one for one in request.profiling_info if one.node_type not in BORDERS]
        return sum(one.real_time.total_seconds() for one in counted)

    return run


class OnnxRuntime:
    """A session under its own profiler, which writes a file in the end."""

    def __init__(self, graph: Graph, feeds: Mapping[str, np.ndarray], threads: int, folder: Path) -> None:
        import onnxruntime

        from hwopt.io.proto import to_model

        options = session_options(threads)
        options.enable_profiling, options.profile_file_prefix = True, str(folder / "profile")
        model = to_model(graph).SerializeToString()
        self._session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self._feeds = dict(feeds)

    def run(self) -> None:
        self._session.run(None, self._feeds)

    def seconds(self) -> float:
        """The sum over the nodes of the median over the runs; every other run is a warm-up."""
        nodes: dict[str, list[float]] = {}
        for event in json.loads(Path(self._session.end_profiling()).read_text()):
            if event.get("name", "").endswith("_kernel_time") and event["args"]["op_name"] not in BORDERS:
                nodes.setdefault(event["name"], []).append(event["dur"] * 1e-6)
        return sum(median(values[1::2]) for values in nodes.values())


def summary(found: Findings, threads: int) -> dict[str, float]:
    """Geometric means of the ratios to the best peer, by precision and kind of layer."""
    groups: dict[str, list[float]] = {}
    for row in found.rows:
        if row.metric == "latency" and row.ratio:
            words = row.case.split(" ")
            for group in (f"{words[-2]}_{threads}t", f"{words[-2]}_{words[1]}_{threads}t"):
                groups.setdefault(group, []).append(row.ratio)
    means = {group: geometric_mean(values) for group, values in groups.items()}
    return {"failures": len(found.failures), **means, **peak_shares(found)}


def peak_shares(found: Findings) -> dict[str, float]:
    """Of the measured peak, over the 3 x 3 convolutions with 128 and more channels: mean and least, by instruction."""
    shares: dict[str, list[float]] = {}
    for row in found.rows:
        words = row.case.split(" ")
        if (
            row.metric == "peak_share"
            and words[1] == "conv"
            and "t9" in words
            and min(_number(words[3]), _number(words[4]) // 9) >= 128
        ):
            shares.setdefault(words[-2], []).append(row.ours)
    made: dict[str, float] = {}
    for dtype, values in shares.items():
        made |= {f"{units(dtype)}_peak_share": geometric_mean(values), f"{units(dtype)}_peak_share_worst": min(values)}
    return made


def _number(word: str) -> int:
    return int(word[1:])
