"""Files of a long search, never mixed up with those of another search."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from hwopt.errors import UsageError
from hwopt.files import write_whole
from hwopt.ir.graph import param_digest
from hwopt.plan.attempt import Search, versions
from hwopt.plan.plan import Plan
from hwopt.samples import Samples
from hwopt.target import HOST, Target, table_of

PLAN = "plan.json"


def keep_plan(folder: Path, plan: Plan) -> None:
    """The best plan so far."""
    write_whole(folder / PLAN, plan.to_json())


def identity(task: Search, purpose: str) -> str:
    """What a search depends on, as one short word: model, data, the target with its prices, hwopt's version, threads, families,
    seed, budget, and how it judges."""
    data = [_data(one) for one in (task.ctx.calibration, getattr(task.scorer, "samples", None))]
    parts = [
        purpose, task.graph.digest, *data, described(task.target), versions()["hwopt"],
        str(task.threads), str(task.ctx.seed), str(task.budget),
        ",".join(kind.name for kind in task.passes), task.scorer.metric, task.sensitivity, str(task.pairwise), str(task.tie),
    ]  # fmt: skip
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def described(target: Target) -> str:
    """Every number that a target states, and the contents of its price tables: two of one name need not be alike."""
    tables = [path.read_bytes() for one in (target, *target.fallbacks) if (path := table_of(one.cost)) is not None]
    # a machine's clock is read anew each time
    said = (target.summary, target.features, sorted(target.tvm.items())) if target.name == HOST else target
    text = re.sub(r" at 0x[0-9a-f]+", "", repr(said))  # objects that do not say what they hold, but where
    return hashlib.sha256(b"".join([text.encode(), *tables])).hexdigest()


def _data(samples: Samples | None) -> str:
    """Inputs and labels in one word."""
    if samples is None:
        return ""
    return samples.digest if samples.labels is None else samples.digest + param_digest(samples.labels)


def open_folder(folder: Path, name: str, key: str) -> dict[str, Any]:
    """What an earlier run of the same search left in `folder`/`name`; {} if nothing. Raises UsageError for another search's."""
    if folder.exists() and not folder.is_dir():
        raise UsageError("is a file", place=str(folder), hint="--search and --pareto write a folder")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text())
        same = found["search"] == key
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UsageError("damaged", place=str(path), hint="remove it, or name another folder") from error
    if not same:
        hint = "name another folder, or remove it to begin again"
        raise UsageError("is of another model, target, budget, data or version of hwopt", place=str(path), hint=hint)
    return dict(found)
