"""Asks Arm's Vela for the cycles of every layer of ResNet-18 and MobileNetV2 on Ethos-U NPUs and keeps them in data/vela.json.

Vela reads TensorFlow Lite only, so every distinct layer is written as a file of one int8 operator. It has its own environment:

    python -m venv build/vela && build/vela/bin/pip install ethos-u-vela==5.2.0
    python -m benchmarks.vela build/vela/bin/python              (some minutes)
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from benchmarks.networks import mobilenet_v2, resnet
from hwopt.analysis.workload import kernels
from hwopt.io.proto import from_model
from hwopt.ir import Graph, Node
from hwopt.target import Workload

DATA = Path(__file__).with_name("data") / "vela.json"
WORKER = Path(__file__).with_name("_vela_worker.py")
# target -> what Vela calls it: accelerator, system, memory mode
SYSTEMS = {
    "ethos-u55": ("ethos-u55-256", "Ethos_U55_High_End_Embedded", "Shared_Sram"),
    "ethos-u65": ("ethos-u65-512", "Ethos_U65_High_End", "Shared_Sram"),
}


def layers() -> dict[str, tuple[tuple[dict[str, Any], Workload], ...]]:
    """By network: what Vela is asked of a layer, and the layer as the cost model sees it (int8)."""
    graphs = {
        "resnet18": from_model(resnet(1, (2, 2, 2, 2), False, "resnet18")),
        "mobilenet_v2": from_model(mobilenet_v2(1)),
    }
    return {
        name: tuple((_question(graph, region.anchor, work), work) for region, work in kernels(graph) if work.macs)
        for name, graph in graphs.items()
    }


def _question(graph: Graph, node: Node, work: Workload) -> dict[str, Any]:
    data, out = graph.tensor(node.inputs[0]).dims, graph.tensor(node.output).dims
    if work.kind == "matmul":
        return {"kind": "matmul", "inputs": work.k, "outputs": work.n, "height": 1, "rows": 1, "kernel": 1, "stride": 1}
    sizes = {"height": data[2], "rows": out[2], "inputs": data[1], "outputs": out[1]}
    return {"kind": work.kind, **sizes, "kernel": node.attr("kernel_shape")[0], "stride": node.attr("strides", (1, 1))[0]}


def key(target: str, question: dict[str, Any]) -> str:
    return f"{target} " + " ".join(str(value) for _, value in sorted(question.items()))


def jobs() -> Iterator[dict[str, Any]]:
    """Every distinct question."""
    asked = [question for network in layers().values() for question, _ in network]
    for target, (accelerator, system, memory) in SYSTEMS.items():
        for name, question in {key(target, one): one for one in asked}.items():
            yield {"key": name, **question, "accelerator": accelerator, "system": system, "memory": memory}


def stored() -> dict[str, Any]:
    """What Vela said: `cycles` by key, with its version."""
    return json.loads(DATA.read_text())


@click.command()
@click.argument("python")
def main(python: str) -> None:
    """Estimate all layers with the PYTHON that has Vela."""
    questions = "".join(json.dumps(job) + "\n" for job in jobs())
    done = subprocess.run([python, "-W", "ignore", WORKER], input=questions, stdout=subprocess.PIPE, text=True, check=True)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    for one in answers:
        if "error" in one:
            raise click.ClickException(f"{one['key']}: {one['error']}")
    found = {"tool": "ethos-u-vela", "version": answers[0]["version"], "systems": SYSTEMS}
    cycles = {one["key"]: {"total": one["cycles"], "npu": one["npu"]} for one in answers}
    DATA.write_text(json.dumps({**found, "cycles": dict(sorted(cycles.items()))}, indent=1) + "\n")
    click.echo(f"{len(cycles)} layers")


if __name__ == "__main__":
    main()
