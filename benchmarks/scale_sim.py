"""Runs SCALE-Sim v3 on the layers of ResNet-18 and MobileNetV2 and keeps its cycles, with versions, in data/scalesim.json.

SCALE-Sim 3.0.0 (Raj et al., ISPASS 2025) fails with NumPy 2.4, so it gets an environment of its own:

    python -m venv build/scalesim && build/scalesim/bin/pip install scalesim==3.0.0 'numpy<2.3'
    python -m benchmarks.scale_sim build/scalesim/bin/python        (an hour on one core: it simulates cycle by cycle)

Layers are given as [m, k] x [k, n] products; a depthwise layer is one of its channels, times their number.
"""

from __future__ import annotations

import fcntl
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from benchmarks.networks import mobilenet_v2, resnet
from hwopt.analysis.workload import workloads
from hwopt.io.proto import from_model
from hwopt.target import Workload

DATA = Path(__file__).with_name("data") / "scalesim.json"
WORKER = Path(__file__).with_name("_scale_sim_worker.py")
DATAFLOWS = ("ws", "os", "is")
SIDE, SCRATCHPAD_KIB, BANDWIDTH = 64, 512, 32  # cells, KiB of each of three, bytes a cycle of each of three ports


def layers() -> dict[str, tuple[Workload, ...]]:
    """Convolutions and matmuls of both networks, as the compiler sees them, in running order."""
    graphs = {
        "resnet18": from_model(resnet(1, (2, 2, 2, 2), False, "resnet18")),
        "mobilenet_v2": from_model(mobilenet_v2(1)),
    }
    return {name: tuple(one for one in workloads(graph) if one.macs) for name, graph in graphs.items()}


def key(one: Workload, dataflow: str) -> str:
    """What SCALE-Sim is asked: equal layers are simulated once."""
    return f"{dataflow} {one.m} {one.n} {one.k}"


def jobs() -> Iterator[dict[str, Any]]:
    """Every distinct question, the small ones first."""
    found = {key(one, flow): (one, flow) for network in layers().values() for one in network for flow in DATAFLOWS}
    for name, (one, flow) in sorted(found.items(), key=lambda item: item[1][0].m * item[1][0].n * item[1][0].k):
        yield {"key": name, "m": one.m, "n": one.n, "k": one.k, "dataflow": flow} | configuration()


def configuration() -> dict[str, int]:
    return {"side": SIDE, "kib": SCRATCHPAD_KIB, "bandwidth": BANDWIDTH}


def stored() -> dict[str, Any]:
    """What SCALE-Sim said: `cycles` by key, each {total, stalls}; with its version and configuration."""
    return json.loads(DATA.read_text())


@click.command()
@click.argument("python")
@click.option("--part", default="0/1", help="Only every n-th question, as 0/2 and 1/2.")
def main(python: str, part: str) -> None:
    """Simulate what is not in the data yet with the PYTHON that has SCALE-Sim."""
    index, count = map(int, part.split("/"))
    known = stored()["cycles"] if DATA.exists() else {}
    asked = [job for number, job in enumerate(jobs()) if number % count == index and job["key"] not in known]
    worker = subprocess.Popen([python, "-W", "ignore", WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    if worker.stdin is None or worker.stdout is None:
        raise click.ClickException("the worker has no pipes")
    for job in asked:
        worker.stdin.write(json.dumps(job) + "\n")
        worker.stdin.flush()
        answer = json.loads(worker.stdout.readline())
        _keep(answer)
        click.echo(f"{job['key']}: {answer['total']} cycles, {answer['stalls']} of them stalls")
    worker.stdin.close()
    worker.wait()


def _keep(answer: dict[str, Any]) -> None:
    """Into the file at once, under a lock: two parts may run side by side."""
    DATA.parent.mkdir(exist_ok=True)
    with DATA.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _add(answer)


def _add(answer: dict[str, Any]) -> None:
    found = stored() if DATA.exists() else {"cycles": {}}
    found |= {"tool": "SCALE-Sim", "version": answer["version"], "configuration": configuration()}
    found["cycles"][answer["key"]] = {"total": answer["total"], "stalls": answer["stalls"]}
    found["cycles"] = dict(sorted(found["cycles"].items()))
    part = DATA.with_suffix(".part")
    part.write_text(json.dumps(found, indent=1) + "\n")
    part.replace(DATA)


if __name__ == "__main__":
    main()
