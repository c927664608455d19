"""What a model may hold: known operators, at a known version, and weights that are numbers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

import numpy as np
import onnx

from hwopt.errors import ModelError, did_you_mean
from hwopt.ir import Graph, Node

OLDEST_OPSET = 7

# Operators that multiply by a parameter: an infinite weight makes every output infinite or NaN.
_MULTIPLY = {
    "Conv", "ConvTranspose", "ConvInteger", "Gemm", "MatMul", "Mul", "Div", "Einsum", "PRelu", "LSTM", "GRU", "RNN",
    "BatchNormalization", "InstanceNormalization", "LayerNormalization", "GroupNormalization", "RMSNormalization",
    "QuantizeLinear", "DequantizeLinear",
}  # fmt: skip
_SHOWN = 5


def check_operators(model: onnx.ModelProto, place: str) -> None:
    """Raise ModelError, naming operator, domain and nodes, for an operator that neither ONNX nor ONNX Runtime knows."""
    opsets = {_domain(opset.domain): opset.version for opset in model.opset_import}
    newest = onnx.defs.onnx_opset_version()
    version = opsets.get("", newest)
    if version < OLDEST_OPSET and any(_changed_until(node, version) for node in all_nodes(model.graph)):
        hint = f"export it again with opset {OLDEST_OPSET} or newer"
        raise ModelError(f"opset {version} is older than {OLDEST_OPSET}, the oldest that hwopt reads", place=place, hint=hint)
    if version > newest:
        hint = "pip install --upgrade onnx onnxruntime, or export with an older opset"
        raise ModelError(
            f"opset {version} is newer than {newest}, the newest that onnx {onnx.__version__} knows", place=place, hint=hint
        )
    local = {(function.domain, function.name) for function in model.functions}
    unknown: dict[tuple[str, str], list[str]] = {}
    for node in all_nodes(model.graph):
        key = (_domain(node.domain), node.op_type)
        if key not in local and not _known(*key, opsets):
            unknown.setdefault(key, []).append(node.name or (node.output[0] if node.output else "?"))
    if unknown:
        listed = "; ".join(_unknown(domain, op, names) for (domain, op), names in unknown.items())
        domain, op = next(iter(unknown))
        hint = did_you_mean(op, {o for d, o in _contributed() if d == domain} | _standard(domain)) if op else ""
        raise ModelError(f"unknown operators: {listed}", place=place, hint=hint if hint.startswith("did") else _HINT)


def _changed_until(node: onnx.NodeProto, version: int) -> bool:
    """True if an operator of an old opset has another meaning, or none, in the oldest one that hwopt reads."""
    if _domain(node.domain) or not onnx.defs.has(node.op_type):
        return False
    found = [_schema(node.op_type, limit, "") for limit in (version, OLDEST_OPSET)]
    return None in found or found[0].since_version != found[1].since_version


def _schema(op: str, version: int, domain: str) -> Any:
    try:
        return onnx.defs.get_schema(op, version, domain)
    except onnx.defs.SchemaError:
        return None


_HINT = "hwopt compiles standard ONNX operators and those of ONNX Runtime; replace these before the export"


def _unknown(domain: str, op: str, names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{op or 'unnamed'} of domain {domain or 'ai.onnx'} (node {', '.join(names[:_SHOWN])}{more})"


def all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """The nodes of a graph and of the graphs inside it."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from all_nodes(inner)


def _known(domain: str, op: str, opsets: dict[str, int]) -> bool:
    if (domain, op) in _contributed():
        return True
    if domain not in opsets:
        return False
    schema = _schema(op, opsets[domain], domain)
    return schema is not None and not schema.deprecated


@cache
def _contributed() -> frozenset[tuple[str, str]]:
    """ONNX Runtime's own operators."""
    from onnxruntime.capi.onnxruntime_pybind11_state import get_all_operator_schema

    return frozenset((schema.domain, schema.name) for schema in get_all_operator_schema() if not _is_onnx(schema.domain))


def _is_onnx(domain: str) -> bool:
    return domain == "" or domain.startswith("ai.onnx")


@cache
def _standard(domain: str) -> frozenset[str]:
    return frozenset(schema.name for schema in onnx.defs.get_all_schemas() if schema.domain == domain)


def _domain(name: str) -> str:
    return "" if name == "ai.onnx" else name


def check_finite(graph: Graph) -> None:
    """Raise ModelError, naming the parameters, for NaN anywhere and for infinite weights.

    Infinity is a legal constant where nothing multiplies by it: a mask of -inf that is added, the bound of a Clip.
    """
    bad = [reason for name, array in graph.params.items() if (reason := _not_finite(name, array, graph.users.get(name, ())))]
    if bad:
        more = f" and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
        hint = "retrain or repair the model, or allow them: load(..., allow_nan=True)"
        raise ModelError(f"weights are no numbers: {', '.join(bad[:_SHOWN])}{more}", place=graph.name, hint=hint)


def _not_finite(name: str, array: np.ndarray, users: Iterable[Node]) -> str:
    if array.dtype.kind in "biuOSUM" or not _is_float(array.dtype):
        return ""
    if np.isfinite(array).all():
        return ""
    nans = int(np.isnan(array).sum())
    if nans:
        return f"{name} holds {nans} NaN"
    multiplied = any(node.op in _MULTIPLY for node in users)
    added = any(node.op == "Add" for node in users) and bool((array == np.inf).any())
    return f"{name} holds {int(np.isinf(array).sum())} Inf" if multiplied or added else ""


def _is_float(dtype: np.dtype) -> bool:
    return dtype.kind in "fc" or "float" in dtype.name
