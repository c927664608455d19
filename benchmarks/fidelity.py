"""Suite `fidelity`: what the cost models say against who knows better. One function per kind of hardware."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx

from benchmarks import host_kernels, scale_sim, vela
from benchmarks.layout import Row, result
from benchmarks.networks import Network, mobilenet_v2, resnet
from benchmarks.scale_sim_memory import total_cycles
from hwopt.analysis.workload import workloads
from hwopt.errors import UsageError
from hwopt.io.proto import from_model
from hwopt.plugins import find_target
from hwopt.target import Workload
from targets._arm import ArmCore, table
from targets._npu import BlockArray
from targets._systolic import DATAFLOWS, Systolic

WITHIN = 0.1
NCNN = Path(__file__).with_name("data") / "ncnn_arm.json"


@dataclass(frozen=True)
class Part:
    """What one kind of hardware adds to the suite."""

    rows: Sequence[Row] = ()
    summary: Mapping[str, float] = field(default_factory=dict)
    notes: Sequence[str] = ()


def run() -> dict[str, Any]:
    """All parts; every one may be left out where its peer cannot be had, with a note that says why."""
    parts = [part() for part in PARTS]
    summary = {name: value for part in parts for name, value in part.summary.items()}
    return result("fidelity", [row for part in parts for row in part.rows], summary, [n for part in parts for n in part.notes])


# ------------------------------------------------------------------------------------------------------------ systolic arrays


@dataclass(frozen=True)
class Compared:
    """One layer under one dataflow: cycles of ours and of SCALE-Sim, without and with its stalls for DRAM."""

    network: str
    layer: str
    dataflow: str
    ours: float
    theirs: float
    ours_stalled: float
    theirs_stalled: float
    tiled: float  # of the targets' own model, which fetches blocks and not rounds
    low: float  # and its interval
    high: float


def systolic() -> Part:
    """Every convolution and matmul of ResNet-18 and MobileNetV2, all dataflows, against SCALE-Sim's stored cycles."""
    known = scale_sim.stored()
    found = [one for network, layers in scale_sim.layers().items() for one in _compared(network, layers, known["cycles"])]
    layers = [
        [one for one in found if (one.network, one.layer) == key] for key in dict.fromkeys((o.network, o.layer) for o in found)
    ]
    summary = {
        "systolic_layers_within_10": _share([_near(one.ours_stalled, one.theirs_stalled) for one in found]),
        "systolic_compute_within_10": _share([_near(one.ours, one.theirs) for one in found]),
        "systolic_own_prefetcher_within_10": _share([_near(one.tiled, one.theirs_stalled) for one in found]),
        "systolic_inside_interval": _share([one.low <= one.theirs_stalled <= one.high for one in found]),
        "systolic_rankings_agree": _share(
            [_ranked(flows, "ours_stalled") == _ranked(flows, "theirs_stalled") for flows in layers]
        ),
    }
    config = known["configuration"]
    note = (
        f"systolic: {known['tool']} {known['version']}, {config['side']} x {config['side']} cells, {config['kib']} KiB for each "
        f"scratchpad, {config['bandwidth']} bytes a cycle for each port; {len(found)} layers x dataflows. Stalls: with its "
        "prefetcher's rules; own_prefetcher is the targets' model, which fetches blocks again and not whole rounds"
    )
    return Part(list(_network_rows(found)), summary, [note])


def array(dataflow: str) -> Systolic:
    """The array that SCALE-Sim was configured as."""
    size = scale_sim.SCRATCHPAD_KIB << 10
    return Systolic(
        scale_sim.SIDE, scale_sim.SIDE, 1.0, size, size, size, 3.0 * scale_sim.BANDWIDTH, dataflow=dataflow,
        partial_sums="spill", launch_cycles=0,
    )  # fmt: skip


def _compared(network: str, layers: Sequence[Workload], cycles: Mapping[str, Any]) -> Iterator[Compared]:
    for index, layer in enumerate(layers):
        one = _group(layer)
        for flow in DATAFLOWS:
            model, theirs = array(flow), cycles[scale_sim.key(layer, flow)]
            stalled = total_cycles(model, one, scale_sim.BANDWIDTH)
            own = (model.cycles(one), *model.interval(one))
            values = (model.array_cycles(one), theirs["total"] - theirs["stalls"], stalled, theirs["total"], *own)
            yield Compared(network, f"{index} {layer.name}", flow, *(value * layer.groups for value in values))


def _group(layer: Workload) -> Workload:
    """One group of a layer as the product that SCALE-Sim was given: it fetches the rows of every window."""
    m, n, k = layer.m, layer.n, layer.k
    return Workload(layer.name, "matmul", "int8", m=m, n=n, k=k, read_bytes=m * k, weight_bytes=k * n, write_bytes=m * n)


def _near(ours: float, theirs: float) -> bool:
    return abs(ours / theirs - 1) <= WITHIN


def _ranked(flows: Sequence[Compared], name: str) -> tuple[str, ...]:
    """Dataflows, the fastest first; those within 1 % of each other count as equal."""
    best: list[tuple[float, str]] = []
    for seconds, flow in sorted((getattr(one, name), one.dataflow) for one in flows):
        same = best and seconds <= 1.01 * best[-1][0]
        best.append((best[-1][0] if same else seconds, flow))
    return tuple(flow for _, flow in sorted(best))


def _network_rows(found: Sequence[Compared]) -> Iterator[Row]:
    for network in dict.fromkeys(one.network for one in found):
        for flow, words in DATAFLOWS.items():
            some = [one for one in found if (one.network, one.dataflow) == (network, flow)]
            case = f"{network}, {words}"
            for metric, mine, other in (("cycles", "ours", "theirs"), ("cycles with stalls", "ours_stalled", "theirs_stalled")):
                ours, theirs = (sum(getattr(one, name) for one in some) for name in (mine, other))
                yield Row(case, metric, "cycles", ours, {"SCALE-Sim": theirs}, ours / theirs)


def _share(hits: Sequence[bool]) -> float:
    return sum(hits) / len(hits)


# ----------------------------------------------------------------------------------------------------------------------- NPUs


def npu() -> Part:
    """Every layer of both networks on Ethos-U55 and U65 against the cycles that Arm's compiler Vela states."""
    known = vela.stored()
    networks = vela.layers().items()
    rows: list[Row] = []
    ratios: dict[str, list[float]] = {target: [] for target in vela.SYSTEMS}
    for target, (network, layers) in itertools.product(vela.SYSTEMS, networks):
        cost = find_target(target).cost
        if not isinstance(cost, BlockArray):
            raise UsageError(f"{target} is no NPU")
        pairs = [
            (cost.estimate(_integer(work), 1).seconds * cost.hertz, known["cycles"][vela.key(target, question)]["total"])
            for question, work in layers
        ]
        ratios[target] += [ours / theirs for ours, theirs in pairs]
        ours, theirs = (sum(values) for values in zip(*pairs, strict=True))
        rows.append(Row(f"{network}, {target}", "cycles", "cycles", ours, {"Vela": theirs}, ours / theirs))
    every = [ratio for found in ratios.values() for ratio in found]
    summary = {f"npu_layers_within_{limit}": _share([abs(ratio - 1) <= limit / 100 for ratio in every]) for limit in (10, 25)}
    summary |= {f"npu_{target}_median_ratio": statistics.median(found) for target, found in ratios.items()}
    note = f"npu: {known['tool']} {known['version']}, its total cycles for each of {len(every)} layers as a network of its own"
    return Part(rows, summary, [note])


# ------------------------------------------------------------------------------------------------------------------ Arm cores


def arm() -> Part:
    """Whole networks on Arm boards against ncnn's published table: predicted milliseconds, not tuned to it.

    Theirs are other kernels than ours: Winograd's products (a 3 x 3 convolution in 4/9 of the multiplications), and half
    precision where the core has it. The ratio says how far a prediction of our code may be from what the board can do.
    """
    known = json.loads(NCNN.read_text())
    rows = [row for board in known["runs"] for row in _board_rows(board)]
    ratios = {name: [row.ours / row.peers["ncnn"] for row in rows if name in row.case] for name in ("f32", "int8")}
    summary = {f"arm_{name}_median_ratio_to_ncnn": statistics.median(found) for name, found in ratios.items()}
    summary["arm_within_factor_2"] = _share([0.5 <= ratio <= 2 for found in ratios.values() for ratio in found])
    tool = table("cortex-a76")["tool"]
    note = f"arm: predictions by {tool} on TVM's code against {known['source']}; ncnn uses Winograd, and fp16 on Cortex-A76"
    return Part(rows, summary, [note])


def _board_rows(board: Mapping[str, Any]) -> Iterator[Row]:
    cost = find_target(board["target"]).cost
    if not isinstance(cost, ArmCore):
        raise UsageError(f"{board['target']} is no Arm core")
    cost = dataclasses.replace(cost, hertz=board["hertz"])
    for name, milliseconds in board["ms"].items():
        works = _works(name.removesuffix("_int8"), name.endswith("_int8"))
        ours = sum(cost.estimate(work, board["threads"]).seconds for work in works) * 1e3
        case = f"{board['board']}, {board['threads']} threads, {name.removesuffix('_int8')} {'int8' if 'int8' in name else 'f32'}"
        yield Row(case, "predicted", "ms", ours, {"ncnn": milliseconds}, milliseconds / ours)


@functools.cache
def _works(name: str, integer: bool) -> tuple[Workload, ...]:
    """The kernels of a network; as int8 every tensor is a quarter as large."""
    found = workloads(from_model(NETWORKS[name]()))
    return tuple(_integer(one) for one in found) if integer else found


def _integer(one: Workload) -> Workload:
    """A float kernel as int8: every tensor a quarter as large."""
    sizes = ("read_bytes", "write_bytes", "weight_bytes")
    return dataclasses.replace(one, dtype="int8", **{size: getattr(one, size) // 4 for size in sizes})


def squeezenet() -> onnx.ModelProto:
    """Iandola et al., "SqueezeNet", 2016: version 1.1, 227 x 227 as ncnn runs it."""
    net = Network("squeezenet")
    x = net.relu(net.random_conv(net.input("image", (1, 3, 227, 227)), (3, 64), 3, 2))
    inputs = 64
    for index, (squeeze, expand) in enumerate(
        ((16, 64), (16, 64), (32, 128), (32, 128), (48, 192), (48, 192), (64, 256), (64, 256))
    ):
        if index in (0, 2, 4):
            x = net.add("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2])
        narrow = net.relu(net.random_conv(x, (inputs, squeeze), 1))
        sides = [net.relu(net.random_conv(narrow, (squeeze, expand), kernel)) for kernel in (1, 3)]
        x, inputs = net.add("Concat", *sides, axis=1), 2 * expand
    return net.model(net.mean(net.relu(net.random_conv(x, (512, 1000), 1))), (1, 1000))


NETWORKS: Mapping[str, Callable[[], onnx.ModelProto]] = {
    "squeezenet": squeezenet,
    "mobilenet_v2": lambda: mobilenet_v2(1),
    "resnet18": lambda: resnet(1, (2, 2, 2, 2), False, "resnet18"),
    "resnet50": lambda: resnet(1, (3, 4, 6, 3), True, "resnet50"),
}


# --------------------------------------------------------------------------------------------------------------- this machine


def host() -> Part:
    """The zoo in every dtype on one thread: prices of `host` against its kernels and models, measured; none was in the table."""
    return Part(*host_kernels.part())


PARTS = (systolic, npu, arm, host)
