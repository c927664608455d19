"""Plans for hardware that hwopt generates no code for, or not for all of it, say so; compile chooses otherwise."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hwopt.compiler import _generated
from hwopt.decide import decided
from hwopt.emit.products import Form
from hwopt.io.onnx import save
from hwopt.job import Job, prepare, quiet
from hwopt.plan.budget import Budget
from hwopt.plan.explain import explain
from hwopt.plan.plan import plan_from_json
from hwopt.report.outcome import estimated_report, plan_report
from hwopt.report.page import page
from tests._recover import blobs, trained_net

INTEGERS = "hwopt generates float kernels for CUDA only; this plan's integers need another backend"


def job_for(folder: Path, target: str, passes: str = "quantize") -> Job:
    save(trained_net(), folder / "net.onnx")
    seen = blobs(64, 2)
    return prepare(
        folder / "net.onnx", target=target, shapes=None, binds=None, calibrate=blobs(32, 1).arrays, budget=Budget(0.5),
        evaluate={**seen.arrays, "labels": np.asarray(seen.labels)}, passes=passes, threads=1, seed=0, progress=quiet,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("target", "passes", "said"),
    [
        ("nvidia-a100", "quantize", INTEGERS),
        ("nvidia-a100", "quantize{}", INTEGERS),
        ("nvidia-a100", "low-rank{site=%s,rank=2}", ""),
        ("ethos-u55", "quantize", "hwopt generates no code for ethos-u55; this plan needs another backend"),
        ("systolic-16x16", "quantize", ""),
    ],
)
def test_a_plan_says_what_of_it_needs_another_backend(target: str, passes: str, said: str, tmp_path: Path) -> None:
    job = job_for(tmp_path, target, passes.replace("%s", trained_net().nodes[-1].name))
    found = decided(job, None)
    assert found.plan.decisions and found.plan.lacking == said
    assert plan_from_json(found.plan.to_json()) == found.plan
    assert [line for line in explain(found.plan).splitlines() if "backend" in line] == [f"note: {said}"] * bool(said)
    assert page(plan_report(job, found), found.plan).count("another backend</p>") == bool(said)


def test_compile_chooses_only_what_it_can_emit_and_says_so(tmp_path: Path) -> None:
    job = _generated(job_for(tmp_path, "nvidia-a100", "quantize,low-rank,prune-channels"), Form(("static",)))
    found = decided(job, None)
    assert found.plan.rounds and "quantize" not in found.plan.families and not found.plan.lacking
    library = SimpleNamespace(weight_bytes=1, arena_bytes=1)
    built: Any = SimpleNamespace(kind="cuda", library=library, tuning="", coded_note="")
    notes = estimated_report(job, found, built)["notes"]
    assert "hwopt generates float kernels for CUDA only: changes to integers were not considered" in notes
