"""hwopt: a hardware-aware, compiler-style optimizer for trained models.

    artifact = hwopt.compile("model.onnx", out="build/model", calibrate="data.npz", evaluate="test.npz")
    outputs = artifact.run({"input": array})

compile     a trained model in, an Artifact out, within a Budget
Artifact    what ships: the library with its model, plan and report; run and bench it
Budget      how much the score may fall, and limits of seconds, bytes, joules
Form        what is delivered: which libraries, objects or sources, threads or none, a heap or none
Plan        which change was chosen for which layer, and what was refused why; JSON both ways
load        an ONNX file or a torch module as a Graph
Graph       the immutable model; `graph.edit()` makes a changed one
Pass        one transformation: the base class of your own
PassManager runs passes one after the other and verifies what changed
Target      one piece of hardware, with its cost model
HwoptError  every error that hwopt raises on purpose: message, place, hint
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hwopt.artifact import Artifact as Artifact
    from hwopt.compiler import compile_model as compile  # noqa: F401
    from hwopt.emit.products import Form as Form
    from hwopt.errors import HwoptError as HwoptError
    from hwopt.io.onnx import load as load
    from hwopt.ir import Graph as Graph
    from hwopt.pipeline import Pass as Pass
    from hwopt.pipeline import PassManager as PassManager
    from hwopt.plan.budget import Budget as Budget
    from hwopt.plan.plan import Plan as Plan
    from hwopt.target import Target as Target

_HOMES = {
    "Artifact": "hwopt.artifact:Artifact",
    "Budget": "hwopt.plan.budget:Budget",
    "Form": "hwopt.emit.products:Form",
    "Graph": "hwopt.ir:Graph",
    "HwoptError": "hwopt.errors:HwoptError",
    "Pass": "hwopt.pipeline:Pass",
    "PassManager": "hwopt.pipeline:PassManager",
    "Plan": "hwopt.plan.plan:Plan",
    "Target": "hwopt.target:Target",
    "compile": "hwopt.compiler:compile_model",
    "load": "hwopt.io.onnx:load",
}
__all__ = sorted(_HOMES)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    """Public names are imported when they are used: `import hwopt` stays quick."""
    if name not in _HOMES:
        raise AttributeError(f"module 'hwopt' has no attribute {name!r}")
    module, _, attribute = _HOMES[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return __all__
