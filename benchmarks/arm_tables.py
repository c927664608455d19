"""Makes targets/data/arm_<core>.json: throughput of the inner loops that TVM generates for a core, by llvm-mca.

    apt install llvm-19; python -m benchmarks.arm_tables [--mca llvm-mca-19]

Nothing of it runs on an Arm machine. llvm-mca issues the instructions of a loop on LLVM's model of the core: latencies, ports and
dispatch, every load hitting the first-level cache. Cortex-A76 is taken as Neoverse N1, which is the same core to LLVM's eyes and
Arm's (its guide lists the same throughputs); for Cortex-A72 LLVM has the model of its predecessor A57.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from hwopt.backends.tvm import kernels
from hwopt.backends.tvm.kernels.spec import ConvSpec
from hwopt.errors import ToolchainError
from hwopt.plan.search import versions
from targets import _isa_arm

DATA = Path(__file__).parents[1] / "targets" / "data"
# target -> the scheduling model that llvm-mca is asked for, and what /proc/cpuinfo shows
CORES = {
    "cortex-a53": ("cortex-a53", ()),
    "cortex-a72": ("cortex-a72", ()),
    "cortex-a76": ("neoverse-n1", ("asimddp",)),
    "neoverse-n1": ("neoverse-n1", ("asimddp",)),
    "neoverse-v1": ("neoverse-v1", ("asimddp", "i8mm")),
}
DTYPES = ("float32", "int8")
MACS = {"fmla": 4, "smull": 8, "smull2": 8, "smlal": 8, "smlal2": 8, "sdot": 16, "smmla": 32}
ITERATIONS = 200


@dataclass(frozen=True)
class Loop:
    """An innermost loop: its instructions, the last of which branches back."""

    lines: tuple[str, ...]


@click.command()
@click.option("--mca", default="llvm-mca-19", show_default=True)
def main(mca: str) -> None:
    """Write the table of every core."""
    version = _said([mca, "--version"], "").split("version")[1].split()[0]
    for name, (model, features) in CORES.items():
        core = Core(name, model, frozenset(features), mca)
        loops = {f"{dtype} {kind}": core.measured(dtype, kind) for dtype in DTYPES for kind in ("conv", "depthwise")}
        facts = {"core": name, "scheduling model": model, "tool": f"llvm-mca {version}", "tvm": versions()["apache-tvm"]}
        DATA.mkdir(exist_ok=True)
        (DATA / f"arm_{name.replace('-', '_')}.json").write_text(json.dumps({**facts, "loops": loops}, indent=1) + "\n")
        click.echo(f"{name}: " + ", ".join(f"{key} {one['macs'] / one['cycles']:.2f} MAC/cycle" for key, one in loops.items()))


@dataclass(frozen=True)
class Core:
    """A core to make a table of, and the llvm-mca to ask."""

    name: str
    model: str
    features: frozenset[str]
    mca: str

    def measured(self, dtype: str, kind: str) -> dict[str, Any]:
        """Multiply-adds and cycles of one iteration of the busiest inner loop of a typical kernel."""
        spec, first = typical(dtype, kind), _isa_arm.microkernels(self.features)[dtype]
        micro = next(one for one in (first, *first.others) if not kernels.supports(spec, one))
        schedule = kernels.default_schedule(spec, micro, 1)
        text = assembly(kernels.build(spec, schedule, micro, "kernel"), _isa_arm.llvm(self.features, self.name))
        loop = max(inner_loops(text), key=products)
        return {
            "macs": products(loop), "cycles": round(self.cycles(loop), 3), "instructions": len(loop.lines),
            "positions": schedule.tile_rows * schedule.tile_columns, "channels": schedule.vectors * micro.lanes,
        }  # fmt: skip

    def cycles(self, loop: Loop) -> float:
        """Of one iteration among many."""
        options = ["-mtriple=aarch64-linux-gnu", f"-mcpu={self.model}", f"-iterations={ITERATIONS}"]
        report = _said([self.mca, *options, "-mattr=+dotprod,+i8mm"], "\n".join(loop.lines))
        found = re.search(r"Total Cycles:\s+(\d+)", report)
        if found is None:
            raise ToolchainError(f"{self.mca} states no cycles")
        return int(found[1]) / ITERATIONS


def products(loop: Loop) -> int:
    """Multiply-adds of one iteration, by its instructions on vectors of 128 bits."""
    return sum(MACS.get(line.split()[0], 0) for line in loop.lines)


def typical(dtype: str, kind: str) -> ConvSpec:
    """A layer in the middle of a network, with nothing behind it."""
    data, out = (dtype, dtype) if dtype == "float32" else ("int8", "int32")
    groups = 128 if kind == "depthwise" else 1
    return ConvSpec(
        1, 28, 28, 128, 128, (3, 3), pads=(1, 1, 1, 1), groups=groups, data_dtype=data, weight_dtype=dtype, out_dtype=out
    )


def assembly(function: Any, description: Mapping[str, object]) -> str:
    """What TVM makes of a kernel for a TVM target."""
    import tvm

    named = function.with_attr("global_symbol", "kernel")
    with tvm.transform.PassContext(config={"tirx.disable_assert": True}):
        return str(
            tvm.tirx.build(tvm.IRModule({"kernel": named}), target=tvm.target.Target(dict(description))).inspect_source("asm")
        )


def inner_loops(text: str) -> list[Loop]:
    """Code between a label and the branch back to it with no other branch target between."""
    found, label, lines = [], "", []
    for line in text.splitlines():
        code = line.split("//")[0].strip()
        if re.match(r"\.LBB\w+:", code):
            label, lines = code[:-1], []
        elif code and not code.startswith(".") and not code.endswith(":"):
            lines.append(code)
            if re.match(r"(b|cb|tb)[\w.]*\s", code) and code.split()[-1] == label:
                found.append(Loop(tuple(lines)))
    return found


def _said(command: list[str], text: str) -> str:
    try:
        return subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout
    except FileNotFoundError as error:
        raise ToolchainError(f"no {command[0]} in PATH", hint="apt install llvm-19") from error
    except subprocess.CalledProcessError as error:
        raise ToolchainError(f"{command[0]}: {error.stderr.strip().splitlines()[0]}") from error


if __name__ == "__main__":
    main()
