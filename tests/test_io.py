"""Loading and saving: files and their faults, freezing, binding, normalising, opsets, torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from hwopt.backends import ort
from hwopt.errors import ModelError, UnsupportedError, UsageError
from hwopt.io.onnx import load, read, save
from hwopt.io.opset import PINNED
from hwopt.ir import Graph
from tests.mutations import branches, convolutions, shapes
from tests.node_cases import run, same

RNG = np.random.default_rng(0)


def model_of(
    nodes: list[onnx.NodeProto],
    inputs: dict[str, list[Any]],
    weights: dict[str, Any] | None = None,
    opset: int = PINNED,
    outputs: tuple[str, ...] = ("y",),
    **extra: Any,
) -> onnx.ModelProto:
    infos = [helper.make_tensor_value_info(name, 1, dims) for name, dims in inputs.items()]
    results = [helper.make_tensor_value_info(name, 1, None) for name in outputs]
    held = [onnx.numpy_helper.from_array(np.asarray(array), name) for name, array in (weights or {}).items()]
    body = helper.make_graph(nodes, "model", infos, results, held)
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", opset)], ir_version=8, **extra)


def relu(*dims: Any) -> onnx.ModelProto:
    return model_of([helper.make_node("Relu", ["x"], ["y"])], {"x": list(dims)})


def ops(graph: Graph) -> list[str]:
    return [node.op for node in graph.nodes]


def assert_same_outputs(model: onnx.ModelProto, graph: Graph, *values: np.ndarray) -> None:
    fed = dict(zip(graph.inputs, values, strict=False))
    for expected, found in zip(run(model, list(values)), ort.run(graph, fed).values(), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


# Files


@pytest.mark.parametrize("external", [False, True])
def test_a_saved_model_gives_the_same_bits(tmp_path: Path, external: bool) -> None:
    model = convolutions(21)
    model.graph.initializer.add().CopyFrom(onnx.numpy_helper.from_array(RNG.standard_normal((40, 40)), "unread"))
    onnx.helper.set_model_props(model, {"charset": "abc"})
    path = tmp_path / "m.onnx"
    save(read(model), path, external=external)
    again = read(path)
    assert again.digest == read(model).digest
    assert dict(again.metadata) == {"charset": "abc"}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"][: 1 + external]
    value = RNG.standard_normal((1, 3, 8, 8)).astype(np.float32)
    session = ort.onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    original = ort.onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    assert same(original.run(None, {"x": value}), session.run(None, {"x": value}))


def test_above_protobufs_limit_the_weights_go_beside_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hwopt.io.files.LARGEST_PROTO", 400)  # the kernel alone has 432 bytes
    monkeypatch.setattr("hwopt.io.files.INLINE_BYTES", 100)
    save(read(convolutions(21)), tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx.data").stat().st_size >= 432
    assert read(tmp_path / "m.onnx").digest == read(convolutions(21)).digest
    x = np.ones((1, 3, 8, 8), np.float32)
    assert_same_outputs(convolutions(21), read(tmp_path / "m.onnx"), x)  # the session goes through a file, too


def test_external_weights_of_others_are_read(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save_model(convolutions(21), path, save_as_external_data=True, location="w.bin", size_threshold=0)
    assert read(path).digest == read(convolutions(21)).digest


def test_truncated_external_data_name_file_and_weight(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save_model(convolutions(21), path, save_as_external_data=True, location="w.bin", size_threshold=0)
    (tmp_path / "w.bin").write_bytes((tmp_path / "w.bin").read_bytes()[:100])
    with pytest.raises(ModelError, match=r"m\.onnx: w\.bin is cut short: w ends at byte 432, the file at 100; copy"):
        load(path)
    (tmp_path / "w.bin").unlink()
    with pytest.raises(ModelError, match=r"external data of w are missing: no file w\.bin"):
        load(path)


@pytest.mark.parametrize("place", ["../secret", "/etc/passwd", ""])
def test_external_data_outside_the_folder_are_refused(tmp_path: Path, place: str) -> None:
    model = convolutions(21)
    onnx.external_data_helper.set_external_data(model.graph.initializer[0], place)
    (tmp_path / "secret").write_bytes(bytes(1000))
    (tmp_path / "models").mkdir()
    path = tmp_path / "models" / "m.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match="points outside the model's folder"):
        load(path)


def test_unreadable_files_are_named_with_the_reason(tmp_path: Path) -> None:
    faults = {"absent.onnx": "no such file", ".": "is a directory", "empty.onnx": "is empty", "text.onnx": "not an ONNX model"}
    (tmp_path / "empty.onnx").write_bytes(b"")
    (tmp_path / "text.onnx").write_text("this is no model " * 20)
    for name, reason in faults.items():
        with pytest.raises(ModelError, match=reason) as caught:
            load(tmp_path / name)
        assert caught.value.place == str(tmp_path / name)
        assert caught.value.hint


def test_a_cut_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(convolutions(21).SerializeToString()[:-40])
    with pytest.raises(ModelError, match="cut short"):
        load(path)


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"old")

    def full(self: Path, target: Path) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(ModelError, match="No space left on device"):
        save(read(relu(2)), path)
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]
    assert path.read_bytes() == b"old"


def test_saving_into_a_missing_folder_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be written: No such file"):
        save(read(relu(2)), tmp_path / "absent" / "m.onnx")


# Sizes and constants


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
        ({"x": (7, 4), "z": (8, 4)}, "dimension n is 7, not 8"),
        ({"x": (7, 5), "z": (7, 5)}, "dimension 4 is 4, not 5"),
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


# What a model may hold


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


# One spelling


def test_constants_identities_and_shape_chains_are_gone() -> None:
    model = shapes()
    graph = load(model)
    assert ops(graph) == ["Pad", "Slice", "Reshape"]
    assert_same_outputs(model, graph, RNG.standard_normal((2, 6)).astype(np.float32))


def test_an_output_that_is_an_input_keeps_its_identity() -> None:
    model = model_of([helper.make_node("Identity", ["x"], ["y"])], {"x": [2]})
    assert_same_outputs(model, load(model), np.float32([1, 2]))


@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER", "VALID"])
@pytest.mark.parametrize(("size", "kernel", "stride"), [(8, 3, 1), (8, 3, 2), (9, 2, 3), (7, 4, 2), (8, 1, 2)])
def test_auto_pad_becomes_pads(mode: str, size: int, kernel: int, stride: int) -> None:
    x = RNG.standard_normal((1, 2, size, size + 1)).astype(np.float32)
    weight = RNG.standard_normal((2, 2, kernel, kernel)).astype(np.float32)
    window = {"auto_pad": mode, "kernel_shape": [kernel] * 2, "strides": [stride] * 2}
    made = [
        helper.make_node("MaxPool", ["x"], ["y"], **window),
        helper.make_node("MaxPool", ["x"], ["y"], ceil_mode=1, **window),
        helper.make_node("AveragePool", ["x"], ["y"], **window),
        helper.make_node("AveragePool", ["x"], ["y"], count_include_pad=1, **window),
        helper.make_node("ConvTranspose", ["x", "w"], ["y"], **window),
    ]
    if kernel < stride and mode != "VALID":  # ONNX Runtime refuses the negative pads of these
        made.clear()
    made.append(helper.make_node("Conv", ["x", "w"], ["y"], **window))
    for node in made:
        model = model_of([node], {"x": list(x.shape)}, {"w": weight})
        graph = load(model)
        assert "auto_pad" not in graph.nodes[0].attrs
        assert_same_outputs(model, graph, x)


def test_same_with_holes_gives_one_output_per_stride() -> None:
    node = helper.make_node("Conv", ["x", "w"], ["y"], auto_pad="SAME_UPPER", dilations=[2], strides=[2])
    graph = load(model_of([node], {"x": [1, 1, 11]}, {"w": np.ones((1, 1, 3), np.float32)}))
    assert graph.nodes[0].attr("pads") == (2, 2)
    assert str(graph.types["y"]) == "float32[1,1,6]"  # ONNX Runtime itself cannot run the original


def test_the_output_shape_of_a_transposed_convolution_becomes_pads() -> None:
    x, weight = np.ones((1, 2, 5, 5), np.float32), np.ones((2, 2, 3, 3), np.float32)
    node = helper.make_node("ConvTranspose", ["x", "w"], ["y"], strides=[2, 2], output_shape=[10, 10], auto_pad="SAME_UPPER")
    model = model_of([node], {"x": [1, 2, 5, 5]}, {"w": weight})
    graph = load(model)
    assert graph.nodes[0].attr("pads") == (0, 0, 1, 1)
    assert_same_outputs(model, graph, x)


# Opsets


@pytest.mark.parametrize("opset", [7, 8, 9, 10, 11, 12, 13, 15, 17, 18, 20, 21, 22, 25])
def test_every_opset_arrives_at_the_pinned_one(opset: int) -> None:
    model = convolutions(opset)
    graph = load(model)
    assert graph.opsets[""] == PINNED
    assert_same_outputs(model, graph, RNG.standard_normal((1, 3, 8, 8)).astype(np.float32))


def test_old_spellings_are_converted() -> None:
    nodes = [
        helper.make_node("Squeeze", ["x"], ["a"], axes=[0]),
        helper.make_node("Clip", ["a"], ["b"], min=-1.0, max=1.0),
        helper.make_node("Softmax", ["b"], ["c"], axis=1),
        helper.make_node("Slice", ["c"], ["d"], starts=[0, 1], ends=[3, 4], axes=[0, 2]),
        helper.make_node("Pad", ["d"], ["e"], pads=[0, 1, 0, 0, 1, 0], value=0.5),
        helper.make_node("Upsample", ["e", "scales"], ["f"], mode="nearest"),
        helper.make_node("ReduceSum", ["f"], ["g"], axes=[1], keepdims=0),
        helper.make_node("Unsqueeze", ["g"], ["y"], axes=[0]),
    ]
    model = model_of(nodes, {"x": [1, 3, 4, 5]}, {"scales": np.float32([1, 2, 2])}, opset=9)
    graph = load(model)
    assert graph.opsets[""] == PINNED
    assert_same_outputs(model, graph, RNG.standard_normal((1, 3, 4, 5)).astype(np.float32))


def test_operators_newer_than_the_pin_keep_their_opset() -> None:
    model = model_of([helper.make_node("Swish", ["x"], ["y"])], {"x": [2]}, opset=24)
    graph = load(model)
    assert graph.opsets[""] == 24
    assert_same_outputs(model, graph, np.float32([1, 2]))


def test_opsets_out_of_range_are_refused() -> None:
    for opset, reason in ((5, "older than 7"), (99, "newer than")):
        with pytest.raises(ModelError, match=reason):
            load(model_of([helper.make_node("BatchNormalization", ["x"] * 5, ["y"])], {"x": [2]}, opset=opset))


def test_scan_of_opset_8_is_refused() -> None:
    body = helper.make_graph([helper.make_node("Relu", ["a"], ["b"])], "b", [helper.make_tensor_value_info("a", 1, [2])],
                             [helper.make_tensor_value_info("b", 1, [2])])  # fmt: skip
    node = helper.make_node("Scan", ["", "x"], ["y"], num_scan_inputs=1, body=body)
    with pytest.raises(UnsupportedError, match="batch dimension"):
        load(model_of([node], {"x": [1, 3, 2]}, opset=8))


@pytest.mark.parametrize("name", ["squeezenet", "shufflenet", "inception_v2"])
def test_old_real_topologies_load(name: str) -> None:
    path = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light" / f"light_{name}.onnx"
    model = onnx.load(path)
    graph = load(path)
    assert graph.opsets[""] == PINNED
    x = RNG.standard_normal((1, 3, 224, 224)).astype(np.float32)
    expected = run(model, [x])
    found = ort.run(graph, {graph.inputs[0]: x})
    np.testing.assert_allclose(found[graph.outputs[0]], expected[0], rtol=1e-4, atol=1e-6)


def test_ten_thousand_nodes_load() -> None:
    nodes = [helper.make_node("Relu" if i % 2 else "Identity", [f"v{i}"], [f"v{i + 1}"]) for i in range(10_000)]
    graph = load(model_of(nodes, {"v0": ["n"]}, outputs=("v10000",)), shapes={"v0": (2,)})
    assert len(graph.nodes) == 5_000


# torch


def test_a_torch_module_and_its_exported_program_load(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    module = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.BatchNorm2d(4), torch.nn.SiLU(), torch.nn.Dropout()
    )
    module.train()
    module[0].eval()
    x = torch.randn(1, 3, 8, 8)
    graph = load(module, inputs=(x,))
    assert module.training
    assert not module[0].training
    expected = module.eval()(x).detach().numpy()
    np.testing.assert_allclose(ort.run(graph, {graph.inputs[0]: x.numpy()})[graph.outputs[0]], expected, rtol=1e-4, atol=1e-6)
    torch.export.save(torch.export.export(module, (x,)), tmp_path / "m.pt2")
    again = load(tmp_path / "m.pt2")
    np.testing.assert_allclose(ort.run(again, {again.inputs[0]: x.numpy()})[again.outputs[0]], expected, rtol=1e-4, atol=1e-6)
    with pytest.raises(UsageError, match="needs example inputs"):
        load(module)


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    with pytest.raises(UsageError, match="int is no model"):
        load(3)
    (tmp_path / "m.pt2").write_bytes(b"nothing")
    with pytest.raises(ModelError, match="not a torch program"):
        load(tmp_path / "m.pt2")


def test_onnx_files_load_without_torch_and_its_absence_is_told(tmp_path: Path) -> None:
    save(read(convolutions(21)), tmp_path / "m.onnx")
    code = f"""
import sys
sys.modules["torch"] = None
from hwopt.io.onnx import load
from hwopt.errors import UsageError
assert load({str(tmp_path / "m.onnx")!r}).nodes
try:
    load({str(tmp_path / "m.pt2")!r})
except UsageError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "pip install hwopt[torch]" in done.stdout
