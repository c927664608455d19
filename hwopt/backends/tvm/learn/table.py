"""Tables of measured kernels and the predictor trained on them: JSON files, one for each processor and instruction set."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hwopt.backends.tvm.learn.predictor import Predictor
from hwopt.errors import HwoptError, UsageError
from hwopt.target import MicroKernel, Target, Workload

FORMAT = 2
HINT = "measure again: hwopt profile"


@dataclass(frozen=True, eq=False)
class Table:
    """Seconds, their relative noise and the footprint of the model around them by key, and the predictor for everything else.

    `cpu` and `isa` say what was measured, `threads` for which numbers; `facts` are the date, versions and counts.
    """

    cpu: str
    isa: str
    threads: tuple[int, ...]
    measured: Mapping[str, tuple[float, float, int]]
    model: Predictor
    facts: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """Sorted and compact; `from_json` reads it back."""
        data = {
            "format": FORMAT, "cpu": self.cpu, "isa": self.isa, "threads": list(self.threads), "facts": dict(self.facts),
            "measured": {key: list(value) for key, value in self.measured.items()}, "model": self.model.to_data(),
        }  # fmt: skip
        return json.dumps(data, sort_keys=True, separators=(",", ":")) + "\n"


def from_json(text: str, place: str) -> Table:
    """Raises UsageError that names the file and the key that is wrong."""
    key = "the file"
    try:
        data = json.loads(text)
        for key in ("format", "cpu", "isa", "threads", "facts", "measured", "model"):
            _checked(key, data[key])
        key = "measured"
        measured = {str(name): (float(value[0]), float(value[1]), int(value[2])) for name, value in data["measured"].items()}
        key = "model"
        model = Predictor.from_data(data["model"])
    except HwoptError as error:
        raise UsageError(f"{key}: {error}", place=place, hint=HINT) from error
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        reason = f"missing {error}" if isinstance(error, KeyError) else str(error)
        raise UsageError(f"{key}: {reason}", place=place, hint=HINT) from error
    return Table(data["cpu"], data["isa"], tuple(data["threads"]), measured, model, data["facts"])


def _checked(key: str, value: Any) -> None:
    if key == "format" and value != FORMAT:
        raise ValueError(f"is {value!r}, this hwopt reads {FORMAT}")
    if key == "threads" and not (value and all(isinstance(one, int) and one > 0 for one in value)):
        raise ValueError(f"{value!r} are no numbers of threads")


@functools.lru_cache(maxsize=8)
def load_table(path: Path) -> Table:
    """The table in a file; raises UsageError where it cannot be read."""
    try:
        return from_json(path.read_text(), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot be read: {error}", place=str(path)) from error


def work_key(work: Workload, threads: int) -> str:
    """Names a kernel by what the backend emits for it: 16 hexadecimal digits."""
    data = dataclasses.asdict(dataclasses.replace(work, name="", footprint=0))
    data = {name: value for name, value in data.items() if name not in ("order", "narrow") or value}  # most kernels have none
    if work.narrow == 1:
        data["narrow"] = True  # as it was when tables knew one form only
    return hashlib.sha256(json.dumps([data, threads], sort_keys=True).encode()).hexdigest()[:16]


@functools.cache
def processor() -> str:
    """This machine's processor: name, family and model, which virtual machines leave as they are."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines) if key.strip()}
    known = [facts[name] for name in ("model name", "cpu family", "model", "CPU implementer", "CPU part") if name in facts]
    return " ".join(known) or platform.processor() or platform.machine()


def instructions(llvm: Mapping[str, Any]) -> str:
    """What decides about the code: LLVM's processor and features."""
    return " ".join([str(llvm.get("mcpu", "")), *sorted(map(str, llvm.get("mattr", ())))]).strip()


def instructions_of(micros: Mapping[str, MicroKernel]) -> dict[str, str]:
    """What multiplies each dtype: prices of products hold for other processors that use the same."""
    full = {dtype: one.others[-1] if one.narrow else one for dtype, one in sorted(micros.items())}  # for all weights
    return {dtype: f"{one.intrinsic} {one.lanes} x {one.depth}" for dtype, one in full.items()}


def table_name(cpu: str, isa: str) -> str:
    """The file's name, from which a table is found without opening it."""
    word = re.sub(r"[^a-z0-9]+", "-", cpu.lower()).strip("-")
    return f"cpu_{word}_{_short(isa)}.json"


def _short(isa: str) -> str:
    return hashlib.sha256(isa.encode()).hexdigest()[:8]


def user_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """$XDG_DATA_HOME/hwopt/tables, else in ~/.local/share."""
    base = environment.get("XDG_DATA_HOME")
    return (Path(base) if base else Path.home() / ".local" / "share") / "hwopt" / "tables"


def find_table(llvm: Mapping[str, Any], *folders: Path) -> Path | None:
    """The first file that was measured on this processor with these instructions."""
    name = table_name(processor(), instructions(llvm))
    return next((folder / name for folder in folders if (folder / name).is_file()), None)


def find_measured(llvm: Mapping[str, Any], folder: Path) -> Path | None:
    """A file that was measured with these instructions, on whichever processor; of several the first by name."""
    return next(iter(sorted(folder.glob(f"cpu_*_{_short(instructions(llvm))}.json"))), None)


def path_for(target: Target, folder: Path | None = None) -> Path:
    """Where a table of this processor for that target belongs."""
    return (folder or user_folder()) / table_name(processor(), instructions(target.tvm))
