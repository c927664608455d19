"""Networks that are compiled already and wait to be timed, in a folder: compiling takes ten times as long as timing.

What is compiled while others work can be timed in the few minutes in which nobody does.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hwopt.backends.tvm.learn.measure import Compiled
from hwopt.target import Coded, Workload


@dataclass(frozen=True)
class Network:
    """A random network (`seed`, `form`) for a number of threads. `code` names the templates that it was compiled with."""

    seed: int
    form: str
    threads: int
    code: str
    program: Compiled


def work_from(data: dict[str, Any]) -> Workload:
    """A workload from JSON."""
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}
    coded = values.get("coded")
    values["coded"] = Coded(**coded) if coded else None
    return Workload(**values)


def keep(one: Network, folder: Path) -> None:
    """Writes the folder of a network whose constants lie in it already; it counts from when its JSON is there."""
    program = one.program
    sizes = [len(data) for data in program.objects]
    (folder / "objects.bin").write_bytes(b"".join(program.objects))
    data = {
        "seed": one.seed, "form": one.form, "threads": one.threads, "code": one.code, "owners": program.owners, "sizes": sizes,
        "work": [dataclasses.asdict(work) for work in program.work], "command": {**program.command, "blob": "constants.bin"},
    }  # fmt: skip
    part = folder / "network.part"
    part.write_text(json.dumps(data))
    part.rename(folder / "network.json")


def kept(stock: Path, threads: int, code: str) -> Iterator[tuple[Path, Network]]:
    """The networks that wait, for so many threads; those of other templates are removed."""
    for path in sorted(stock.glob("*/network.json")):
        data = json.loads(path.read_text())
        if data["code"] != code:
            shutil.rmtree(path.parent, ignore_errors=True)
        elif data["threads"] == threads:
            yield path.parent, _network(path.parent, data)


def _network(folder: Path, data: dict[str, Any]) -> Network:
    blob, objects, offset = (folder / "objects.bin").read_bytes(), [], 0
    for size in data["sizes"]:
        objects.append(blob[offset : offset + size])
        offset += size
    command = {**data["command"], "blob": str(folder / "constants.bin")}
    program = Compiled(tuple(map(work_from, data["work"])), tuple(map(tuple, data["owners"])), tuple(objects), command)
    return Network(data["seed"], data["form"], data["threads"], data["code"], program)


def seeds(stock: Path) -> set[int]:
    """Of the networks that wait."""
    return {int(path.parent.name.partition("_")[0]) for path in stock.glob("*/network.json")}
