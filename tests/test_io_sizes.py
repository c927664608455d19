"""Models made ready for compiling: sizes frozen, inputs bound, what cannot be compiled refused by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from hwopt.backends import ort
from hwopt.errors import ModelError, UsageError
from hwopt.io.onnx import load
from tests._io import assert_same_outputs, model_of, ops, relu
from tests.mutations import branches
from tests.node_cases import run, same

RNG = np.random.default_rng(0)


def test_open_sizes_are_an_error_that_shows_the_option() -> None:
    with pytest.raises(UsageError) as caught:
        load(relu("batch", 3, None, 0))
    assert "x is float32[batch,3,?,0]" in str(caught.value)
    assert caught.value.hint == "give the sizes, such as: --shape x=1,3,1,1"


def test_minus_one_and_question_marks_are_open_too() -> None:
    for dim in (-1, "?", "", None):
        with pytest.raises(UsageError, match="leaves sizes open"):
            load(relu(dim, 2))
        assert str(load(relu(dim, dim), shapes={"x": (4, 2)}).types["y"]) == "float32[4,2]"


def test_a_symbol_fixed_at_one_input_is_fixed_at_all() -> None:
    model = model_of([helper.make_node("Add", ["x", "z"], ["y"])], {"x": ["n", 4], "z": ["n", 4]})
    graph = load(model, shapes={"x": (7, 4)})
    assert str(graph.types["z"]) == "float32[7,4]"
    assert str(graph.types["y"]) == "float32[7,4]"


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"x": (7, 4), "z": (8, 4)}, "axis 0 (n) is 7, not 8"),
        ({"x": (7, 5), "z": (7, 5)}, "axis 1 is 4, not 5"),
        ({"x": (7,)}, "2 dimensions, not 1"),
        ({"x": (7, -4)}, "whole number"),
        ({"xx": (7, 4)}, "no input 'xx'; did you mean x"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(given: dict[str, tuple[int, ...]], reason: str) -> None:
    model = model_of([helper.make_node("Add", ["x", "z"], ["y"])], {"x": ["n", 4], "z": ["n", 4]})
    with pytest.raises(UsageError) as caught:
        load(model, shapes=given)
    assert reason in str(caught.value)


def test_stale_stated_types_do_not_survive_freezing() -> None:
    model = model_of(
        [
            helper.make_node("Relu", ["x"], ["r"]),
            helper.make_node("Shape", ["r"], ["s"]),
            helper.make_node("Reshape", ["x", "s"], ["y"]),
        ],
        {"x": ["n", 4]},
    )
    model.graph.value_info.append(helper.make_tensor_value_info("r", 1, [1, 4]))
    assert str(load(model, shapes={"x": (5, 4)}).types["y"]) == "float32[5,4]"


def test_a_bound_input_decides_branches_and_disappears() -> None:
    model = branches()
    x = RNG.standard_normal((2, 6)).astype(np.float32)
    for value in (True, False):
        graph = load(model, binds={"c": value})
        assert graph.inputs == ("x",)
        assert "If" not in ops(graph)
        np.testing.assert_allclose(ort.run(graph, {"x": x})["y"], run(model, [x, np.array(value)])[0], rtol=1e-6)
    undecided = load(model)
    assert ops(undecided).count("If") == 1
    assert_same_outputs(model, undecided, x, np.array(False))


def test_a_decided_branch_inside_a_branch_reads_the_right_values() -> None:
    inner = [
        helper.make_graph(
            [helper.make_node(op, ["m", "x"], [f"o{op}"])], op, [], [helper.make_tensor_value_info(f"o{op}", 1, None)]
        )
        for op in ("Add", "Sub")
    ]
    then = helper.make_graph(
        [helper.make_node("Neg", ["x"], ["m"]), helper.make_node("If", ["d"], ["i"], then_branch=inner[0], else_branch=inner[1])],
        "then", [], [helper.make_tensor_value_info("i", 1, None)],
    )  # fmt: skip
    other = helper.make_graph([helper.make_node("Abs", ["x"], ["m"])], "else", [], [helper.make_tensor_value_info("m", 1, None)])
    model = model_of([helper.make_node("If", ["c"], ["y"], then_branch=then, else_branch=other)], {"x": [3]})
    model.graph.input.extend(helper.make_tensor_value_info(name, onnx.TensorProto.BOOL, []) for name in "cd")
    x = RNG.standard_normal(3).astype(np.float32)
    for c in (True, False):
        half = load(model, binds={"c": c})  # the inner If stays: it captures a renamed value
        for d in (True, False):
            expected = run(model, [x, np.array(c), np.array(d)])[0]
            assert same(expected, ort.run(load(model, binds={"c": c, "d": d}), {"x": x})["y"])
            feeds = {name: value for name, value in (("x", x), ("d", np.array(d))) if name in half.inputs}
            assert same(expected, ort.run(half, feeds)["y"])


@pytest.mark.parametrize(
    ("value", "reason"),
    [("many", "is no bool"), ([True, False], "the shape"), (2, "cannot hold"), (None, "and None is not")],
)
def test_values_that_do_not_fit_are_refused(value: Any, reason: str) -> None:
    with pytest.raises(UsageError) as caught:
        load(branches(), binds={"c": value})
    assert reason in str(caught.value)


def test_text_is_bound_as_the_inputs_type() -> None:
    assert "If" not in ops(load(branches(), binds={"c": "true"}))
    with pytest.raises(UsageError, match="no input 'cc'; did you mean c"):
        load(branches(), binds={"cc": "true"})


def test_unknown_operators_are_all_named() -> None:
    nodes = [
        helper.make_node("Rellu", ["x"], ["a"], name="act"),
        helper.make_node("Fancy", ["a"], ["y"], name="f", domain="my.domain"),
    ]
    model = model_of(nodes, {"x": [2]})
    with pytest.raises(ModelError) as caught:
        load(model)
    assert "Rellu of domain ai.onnx (node act); Fancy of domain my.domain (node f)" in str(caught.value)
    assert caught.value.hint == "did you mean Relu?"


def test_operators_of_onnx_runtime_pass_through() -> None:
    model = model_of(
        [helper.make_node("BiasGelu", ["x", "b"], ["y"], domain="com.microsoft")], {"x": [2, 3]}, {"b": np.ones(3, np.float32)}
    )
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    assert_same_outputs(model, load(model), RNG.standard_normal((2, 3)).astype(np.float32))


def test_local_functions_are_inlined() -> None:
    body = helper.make_function(
        "mine", "Twice", ["a"], ["b"], [helper.make_node("Add", ["a", "a"], ["b"])], [helper.make_opsetid("", 21)]
    )
    model = model_of([helper.make_node("Twice", ["x"], ["y"], domain="mine")], {"x": [2]}, functions=[body])
    model.opset_import.append(helper.make_opsetid("mine", 1))
    assert ops(load(model)) == ["Add"]


def test_nan_weights_are_refused_by_name_and_can_be_allowed() -> None:
    weight = np.ones((3, 3), np.float32)
    weight[1, 2] = np.nan
    model = model_of([helper.make_node("MatMul", ["x", "w"], ["y"])], {"x": [2, 3]}, {"w": weight})
    with pytest.raises(ModelError, match="w holds 1 NaN"):
        load(model)
    assert load(model, allow_nan=True).params


def test_infinity_is_a_mask_but_no_weight() -> None:
    mask = np.float32([0, -np.inf])
    assert load(model_of([helper.make_node("Add", ["x", "m"], ["y"])], {"x": [2]}, {"m": mask})).params
    with pytest.raises(ModelError, match="m holds 1 Inf"):
        load(model_of([helper.make_node("Mul", ["x", "m"], ["y"])], {"x": [2]}, {"m": mask}))


def test_cycles_and_undefined_values_are_refused() -> None:
    loop = [
        helper.make_node("Add", ["x", "b"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Relu", ["b"], ["y"]),
    ]
    with pytest.raises(ModelError, match="cycle"):
        load(model_of(loop, {"x": [2]}))
    with pytest.raises(ModelError, match="reads nothing, which is never defined"):
        load(model_of([helper.make_node("Relu", ["nothing"], ["y"])], {"x": [2]}))


def test_nodes_in_any_order_are_sorted() -> None:
    model = model_of([helper.make_node("Neg", ["a"], ["y"]), helper.make_node("Relu", ["x"], ["a"])], {"x": [2]})
    assert ops(load(model)) == ["Relu", "Neg"]


def test_a_slice_of_a_negative_size_is_an_error_not_the_end_of_the_process() -> None:
    nodes = [helper.make_node("Pad", ["x", "p"], ["a"]), helper.make_node("Slice", ["a", "s", "e"], ["y"])]
    weights = {"p": np.array([0, -9, 0, 0]), "s": np.array([0, 1]), "e": np.array([1, 2])}
    with pytest.raises(ModelError, match="negative or empty dimension"):
        load(model_of(nodes, {"x": [2, 6]}, weights))
