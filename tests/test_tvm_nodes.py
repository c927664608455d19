"""ONNX's own node tests through TVM: the pinned cases compile and agree; a loss of any of them fails.

`python -m tests.test_tvm_nodes` tries every case and rewrites the list.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from hwopt.backends.tvm.build import build_objects, named, reading
from hwopt.backends.tvm.run import Loaded, load_objects
from hwopt.emit.program import Program
from hwopt.io.proto import from_model
from hwopt.ir import Graph
from hwopt.plugins import find_target

LIST = Path(__file__).parent / "data" / "tvm_nodes.txt"
BATCH = 50  # cases whose kernels are built together: most of the cost is per build
# Inputs that say how (axes, shapes, sizes, quantization), not what: compiled in as constants, as exported models have them.
SECONDARY = {
    "AffineGrid": (1,), "CenterCropPad": (1,), "Clip": (1, 2), "Compress": (1,), "ConstantOfShape": (0,), "CumSum": (1,),
    "DequantizeLinear": (1, 2), "Dropout": (1, 2), "Expand": (1,), "MaxUnpool": (1, 2), "OneHot": (1, 2), "Pad": (1, 2, 3),
    "Pow": (1,), "QuantizeLinear": (1, 2), "Range": (0, 1, 2), "Reshape": (1,), "Resize": (1, 2, 3), "Slice": (1, 2, 3, 4),
    "Split": (1,), "Squeeze": (1,), "Tile": (1,), "TopK": (1,), "Trilu": (1,), "Unsqueeze": (1,), "Upsample": (1,),
    **{f"Reduce{kind}": (1,) for kind in "L1 L2 LogSum LogSumExp Max Mean Min Prod Sum SumSquare".split()},  # noqa: SIM905
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    name: str
    graph: Graph
    feeds: Mapping[str, np.ndarray]
    expected: tuple[np.ndarray, ...]
    rtol: float
    atol: float


def case_of(test: Any) -> Case:
    """A node test with static shapes and its secondary inputs as parameters; raises where it has other than tensors."""
    model = onnx.ModelProto()
    model.CopyFrom(test.model)
    given, expected = (tuple(map(tensor, part)) for part in test.data_sets[0])
    fixed = {node.input[i] for node in model.graph.node for i in SECONDARY.get(node.op_type, ()) if i < len(node.input)}
    arrays = dict(zip((value.name for value in model.graph.input), given, strict=False))
    for name in fixed & set(arrays):
        model.graph.initializer.append(numpy_helper.from_array(arrays[name], name))
    kept = [value for value in model.graph.input if value.name in arrays and value.name not in fixed]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    for value, array in ((v, arrays[v.name]) for v in model.graph.input):
        set_shape(value, array.shape)
    for value, array in zip(model.graph.output, expected, strict=True):
        set_shape(value, array.shape)
    feeds = {value.name: arrays[value.name] for value in kept}
    return Case(test.name, from_model(model), feeds, expected, test.rtol, test.atol)


def tensor(value: Any) -> np.ndarray:
    if isinstance(value, onnx.TensorProto):
        return numpy_helper.to_array(value)
    if isinstance(value, list | dict) or value is None:
        raise TypeError("no tensor")
    return np.asarray(value)


def set_shape(value: onnx.ValueInfoProto, shape: Iterable[int]) -> None:
    kind = value.type.tensor_type
    kind.ClearField("shape")
    kind.shape.SetInParent()
    for size in shape:
        kind.shape.dim.add().dim_value = size


def node_tests() -> Mapping[str, Any]:
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {test.name: test for test in collect_testcases(None)}


def failures(found: Iterable[Any]) -> Iterator[tuple[str, str]]:
    """(name, reason) of every case that does not compile or does not agree."""
    host, batch = find_target("host"), []
    for test in found:
        try:
            case = case_of(test)
            batch.append((case, *named(reading(case.graph, host), "nodes")))
        except Exception as error:  # whatever goes wrong is the result
            yield test.name, f"{type(error).__name__}: {error}"
        if len(batch) == BATCH:
            yield from run_batch(batch)
            batch = []
    yield from run_batch(batch)


def run_batch(batch: list[tuple[Case, Program, dict[str, Any]]]) -> Iterator[tuple[str, str]]:
    functions = {symbol: function for _, _, part in batch for symbol, function in part.items()}
    try:
        library = load_objects(build_objects(functions, find_target("host"))) if functions else None
    except Exception as error:  # one bad kernel spoils the batch: find it by halving
        if len(batch) == 1:
            yield batch[0][0].name, f"{type(error).__name__}: {error}"
            return
        yield from run_batch(batch[: len(batch) // 2])
        yield from run_batch(batch[len(batch) // 2 :])
        return
    for case, program, _ in batch:
        reason = disagreement(case, Loaded(program, library).run(case.feeds))
        if reason:
            yield case.name, reason


def disagreement(case: Case, outputs: Mapping[str, np.ndarray]) -> str:
    for (name, found), expected in zip(outputs.items(), case.expected, strict=True):
        if found.dtype != expected.dtype or found.shape != expected.shape:
            return f"{name}: {found.dtype}{found.shape}, not {expected.dtype}{expected.shape}"
        half = expected.dtype.itemsize == 2 and expected.dtype.kind not in "iu"
        rtol, atol = (5e-3, 2e-3) if half else (max(case.rtol, 1e-3), max(case.atol, 1e-5))
        if expected.dtype.kind not in "fiub":
            found, expected = found.astype(np.float32), expected.astype(np.float32)
        if not np.allclose(found, expected, rtol, atol, equal_nan=True):
            return f"{name}: values differ"
    return ""


@pytest.mark.slow
def test_pinned_node_tests_compile_and_agree() -> None:
    pinned = LIST.read_text().split()
    assert len(pinned) >= 900
    known = node_tests()
    missing = [name for name in pinned if name not in known]
    assert len(missing) < 50, "this onnx lacks many of the pinned cases"
    lost = dict(failures(known[name] for name in pinned if name in known))
    assert not lost


if __name__ == "__main__":
    everything = node_tests()
    bad = dict(failures(everything.values()))
    good = sorted(set(everything) - set(bad))
    LIST.write_text("\n".join(good) + "\n")
    for case_name, why in bad.items():
        print(case_name, why.replace("\n", " ")[:200])
    print(f"{len(good)} of {len(everything)} cases agree")
