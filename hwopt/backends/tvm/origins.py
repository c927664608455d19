"""Which regions of the graph each kernel computes: TVM fuses and orders what no template covers as it likes.

Every variable is named after the region that emits it; names survive TVM's passes, but for the results of fused kernels, which
come in the order in which they were emitted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

NAME = re.compile(r"region(\d+)_\d*")
ATTRIBUTE = "hwopt.origins"


def naming_builder() -> Any:
    """A BlockBuilder that names variables after the number of the region in `origin`, where nobody names them.

    A reshape of a reshape is one: TVM would fuse the two into a kernel that copies.
    """
    from tvm import relax

    class Naming(relax.BlockBuilder):
        origin = 0

        def emit(self, expr: Any, name_hint: str = "") -> Any:
            source = self._reshaped(expr)
            given = self._reshaped(self.lookup_binding(source)) if isinstance(source, relax.Var) else None
            one = relax.op.reshape(given, expr.args[1]) if given is not None else expr
            return super().emit(one, name_hint or f"region{self.origin}_")

        def _reshaped(self, expr: Any) -> Any:
            """What an expression is a reshape of; None if it is none."""
            return expr.args[0] if getattr(getattr(expr, "op", None), "name", "") == "relax.reshape" else None

    return Naming()


def with_origins(module: Any, names: Sequence[str], labels: Mapping[str, Sequence[str]]) -> Any:
    """The module, its `main` with the regions of every variable: from names as above, or `labels` of variables with others."""
    found = {}
    for name in _bindings(module["main"]):
        if name in labels:
            found[name] = list(labels[name])
        elif match := NAME.fullmatch(name):
            found[name] = [names[int(match[1])]]
    return _attached(module, found)


def fused_origins(before: Any, after: Any) -> Any:
    """`after` TVM's fusion: its `main` with the regions of fused kernels, from what `before` says of their parts."""
    from tvm import relax

    known, main, inside = origins_of(before["main"]), _bindings(after["main"]), {}
    for name, value in main.items():
        called = after[value.op] if isinstance(value, relax.Call) and hasattr(value.op, "name_hint") else None
        if isinstance(called, relax.Function):
            inside[name] = list(_bindings(called))[:-1]  # the last one is called as results are
    seen = {*main, *(name for names in inside.values() for name in names)}
    results = [name for name in _bindings(before["main"]) if name not in seen]
    found = {name: known[name] for name in main if name in known and name not in inside}
    for name, result in zip(inside, results, strict=False):
        parts = [region for part in (*inside[name], result) for region in known.get(part, ())]
        found[name] = list(dict.fromkeys(parts))
    return _attached(after, found)


def origins_of(main: Any) -> dict[str, list[str]]:
    """The regions of every variable of a module's `main`; empty where nobody said."""
    attributes = main.attrs
    return dict(json.loads(str(attributes[ATTRIBUTE]))) if attributes and ATTRIBUTE in attributes else {}


def _bindings(function: Any) -> dict[str, Any]:
    return {binding.var.name: binding.value for block in function.body.blocks for binding in block.bindings}


def _attached(module: Any, found: Mapping[str, list[str]]) -> Any:
    module.update_func(module.get_global_var("main"), module["main"].with_attr(ATTRIBUTE, json.dumps(found)))
    return module
