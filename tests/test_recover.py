"""Recovery: a changed graph is trained by its teacher, and what was learned goes back into the very same structure."""

from __future__ import annotations

import dataclasses
import functools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hwopt.analysis.narrow import pairs_of_layer
from hwopt.backends.ort import run
from hwopt.errors import DataError, PassError, ToolchainError, UsageError
from hwopt.ir import of_op
from hwopt.pipeline import Context, run_pass
from hwopt.recover import Case, Distill, Qat, parse_recipe, recover, recovered
from hwopt.recover.data import divided, source_of
from passes.prune_channels import PruneChannels
from passes.quantize import Quantize
from passes.quantize_weights import QuantizeWeights
from passes.share_weights import ShareWeights
from tests._recover import divergence, net, quantized, samples, shape_of
from tests.random_graphs import Builder, random_samples

torch = pytest.importorskip("torch")
SHORT = "distill{epochs=6,batch=16,lr=0.003,threads=1,warmup=0.1}"


def test_recipes_print_what_they_parse() -> None:
    for text in ("distill", "qat", "distill{epochs=2.5,lr=0.01,scales=false}", "qat{optimizer=sgd,hard=0.5}"):
        assert str(parse_recipe(text)) == text
    assert parse_recipe("distill:epochs=3,lr=0.1") == parse_recipe("distill{epochs=3.0,lr=0.1}")


@pytest.mark.parametrize("text", ["distil", "distill{epoch=3}", "distill{lr=0}", "qat{optimizer=lion}", "distill{logits=0}"])
def test_a_recipe_that_means_nothing_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_recipe(text)


def test_distillation_brings_a_quantized_graph_nearer_to_its_teacher_without_changing_its_form() -> None:
    teacher = net()
    student = quantized(teacher, weights=("int4",))
    better = recover(student, teacher, samples(teacher, 480), SHORT)
    fresh = samples(teacher, 64, seed=9)
    assert divergence(better, teacher, fresh) < 0.8 * divergence(student, teacher, fresh)
    assert shape_of(better) == shape_of(student)
    stamps = {node.history[-1] for node in better.nodes if node.op == "Conv"}
    assert stamps == {node.history[-1] for node in student.nodes if node.op == "Conv"}
    assert all("distill{" in node.history[-1] for node in of_op(better, "QuantizeLinear"))


def test_fewer_samples_than_a_step_takes_are_enough() -> None:
    graph = net()
    outcome = recovered(Case(quantized(graph), graph, samples(graph, 14)), "distill{epochs=2,batch=64,threads=1}")
    assert len(outcome.checks) > 1


def test_the_same_seed_gives_the_same_bits_and_another_seed_others() -> None:
    teacher = net()
    student, data = quantized(teacher, weights=("int4",)), samples(teacher)
    once, again = (recover(student, teacher, data, SHORT) for _ in range(2))
    other = recover(student, teacher, data, SHORT.replace("lr", "seed=5,lr"))
    assert once.digest == again.digest != other.digest


def test_the_teacher_answers_once_for_all_trainings_of_a_job() -> None:
    teacher = net()
    case, other = (Case(quantized(teacher, weights=(kind,)), teacher, samples(teacher)) for kind in ("int4", "int8"))
    alone = recovered(other, SHORT)
    recovered(case, SHORT)
    (answers,) = case.answers.values()
    again = recovered(dataclasses.replace(other, answers=case.answers), SHORT)
    assert again.graph.digest == alone.graph.digest
    assert next(iter(case.answers.values())) is answers


def test_the_recipe_of_an_outcome_makes_the_same_graph_without_looking_for_the_best_state() -> None:
    teacher = net()
    case = Case(quantized(teacher, weights=("int4",)), teacher, samples(teacher))
    found = recovered(case, SHORT)
    replayed = recovered(case, str(found.recipe))
    assert found.recipe.until and replayed.graph.digest == found.graph.digest and not replayed.checks


def test_biases_keep_the_scale_of_their_products() -> None:
    teacher = net()
    student = quantized(teacher, weights=("int4",))
    better = recover(student, teacher, samples(teacher), SHORT)
    assert better is not student
    moved = 0
    for node in of_op(better, "Conv", "Gemm"):
        data, weight, bias = (better.producer[value].inputs[1] for value in node.inputs)
        product = better.params[data] * better.params[weight]
        np.testing.assert_array_equal(better.params[bias], product)
        moved += not np.array_equal(better.params[data], student.params[data])
    assert moved == 3


def test_a_student_computes_what_onnx_runtime_does_with_the_written_graph() -> None:
    from hwopt.recover.torch.student import Student, written

    teacher = net()
    for weights in ("int8", "int4"):
        graph = quantized(teacher, weights=(weights,))
        student = Student(graph)
        random = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, one in student.named_parameters():
                share = 0.2 * torch.randn(one.shape, generator=random, dtype=one.dtype)
                one.mul_(share.exp() if name in student.quantizers.learned else 1 + share)
        after = written(graph, student.arrays(), "test")
        feeds = next(iter(samples(teacher, 1, seed=3).feeds(teacher)))
        with torch.no_grad():
            found = student(feeds)[graph.outputs[0]].numpy()
        np.testing.assert_allclose(found, run(after, feeds)[graph.outputs[0]], rtol=1e-4, atol=1e-5)
        assert np.abs(found - run(graph, feeds)[graph.outputs[0]]).max() > 1e-3


def test_an_untrained_student_writes_the_graph_back_as_it_was() -> None:
    from hwopt.recover.torch.student import Student, written

    teacher = net()
    for graph in (quantized(teacher), quantized(teacher, weights=("int4",), reduce_range=True)):
        assert written(graph, Student(graph).arrays(), "test") is graph


def test_training_leaves_no_sums_that_16_bits_could_not_hold_where_there_were_none() -> None:
    from hwopt.recover.torch.student import Student, written

    graph = quantized(net(), reduce_range=True)
    student = Student(graph)
    assert student.paired
    with torch.no_grad():
        for name in student.paired:
            latent = student.value_of(name)
            latent.view(-1)[:] = torch.sign(latent.view(-1)) * latent.abs().max()  # all that meet are as large as can be
            latent.view(-1)[16:] = 0
    after = written(graph, student.arrays(), "test")
    assert after is not graph
    for name, layer in student.paired.items():
        assert pairs_of_layer(after.params[name], layer) == 2


def test_integers_of_three_bits_are_trained_though_they_are_stored_as_codes() -> None:
    from hwopt.recover.torch.coded import CodedStudent
    from hwopt.recover.torch.student import written

    teacher = net()
    graph = run_pass(QuantizeWeights(bits=3), teacher, Context())
    student = CodedStudent(graph)
    assert {(one.low, one.high) for one in student.quantizers.masters.values()} == {(-3, 3)}
    assert written(graph, student.arrays(), "test") is graph
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for one in student.parameters():
            one.mul_(1 + 0.4 * torch.randn(one.shape, generator=random, dtype=one.dtype).clamp(-1, 1))
    after = written(graph, student.arrays(), "test")
    feeds = next(iter(samples(teacher, 1, seed=3).feeds(teacher)))
    with torch.no_grad():
        found = student(feeds)[graph.outputs[0]].numpy()
    np.testing.assert_allclose(found, run(after, feeds)[graph.outputs[0]], rtol=1e-4, atol=1e-5)
    assert [one.op for one in after.nodes] == [one.op for one in graph.nodes]
    assert np.abs(found - run(graph, feeds)[graph.outputs[0]]).max() > 1e-3
    trained = recover(graph, teacher, samples(teacher, 128), SHORT)
    judged = samples(teacher, 48, seed=9)
    assert divergence(trained, teacher, judged) < 0.8 * divergence(graph, teacher, judged)


def test_step_sizes_get_the_gradient_of_learned_step_sizes() -> None:
    """Esser et al. 2020, equation 3, times g = 1 / sqrt(N * Qp)."""
    from hwopt.recover.torch.student import Student

    teacher = net()
    graph = quantized(teacher)
    student = Student(graph)
    node = next(of_op(graph, "Conv"))
    reader = graph.producer[node.inputs[1]]
    name, scale = reader.inputs[0], reader.inputs[1]
    with torch.no_grad():
        student.value_of(name).mul_(1.37)  # some weights leave the range
    seen = torch.randn(graph.tensor(reader.output).dims, generator=torch.Generator().manual_seed(0))
    student.graph = dataclasses.replace(graph, outputs=(reader.output,))
    (student(next(iter(samples(teacher, 1).feeds(teacher))))[reader.output] * seen).sum().backward()
    step = student.value_of(scale).detach().reshape(-1, 1, 1, 1)
    ratio = student.value_of(name).detach() / step
    inside = (ratio.round() >= -127) & (ratio.round() <= 127)
    slope = torch.where(inside, ratio.round() - ratio, ratio.round().clamp(-127, 127))
    channels, factor = len(step), 1 / np.sqrt(graph.params[name].size / len(step) * 127)
    wanted = (slope * seen).sum((1, 2, 3)) * factor
    assert not inside.all() and channels == 8
    torch.testing.assert_close(student.value_of(scale).grad, wanted, rtol=1e-3, atol=1e-6)


def test_nothing_is_shipped_that_training_made_worse() -> None:
    teacher = net()
    student = quantized(teacher)
    found = recovered(Case(student, teacher, samples(teacher)), "distill{epochs=2,batch=16,lr=3,warmup=0,patience=0,threads=1}")
    assert found.graph is student and found.after == found.before and found.recipe.until == -1
    assert recovered(Case(student, teacher, samples(teacher)), str(found.recipe)).graph is student


def test_pruned_and_palette_graphs_learn_the_parameters_that_they_have() -> None:
    teacher, data = net(), samples(net(), 160)
    ctx = Context(calibration=data.head(16))
    pruned = run_pass(PruneChannels(ratio=0.5), teacher, ctx)
    shared = run_pass(ShareWeights(bits=2, site=tuple(n.name for n in of_op(teacher, "Conv"))), teacher, ctx)
    for student in (pruned, shared, run_pass(Quantize(), shared, ctx)):
        better = recover(student, teacher, data, SHORT)
        fresh = samples(teacher, 48, seed=9)
        assert student is not teacher and shape_of(better) == shape_of(student)
        assert divergence(better, teacher, fresh) < 0.95 * divergence(student, teacher, fresh)


def test_zeros_stay_zero_where_that_is_asked_for() -> None:
    teacher = net()
    edit = teacher.edit()
    name = next(of_op(teacher, "Conv")).inputs[1]
    mask = np.random.default_rng(0).random(teacher.params[name].shape) < 0.5
    edit.set_param(name, (teacher.params[name] * mask).astype(np.float32))
    sparse = edit.finish("sparse")
    better = recover(sparse, teacher, samples(teacher), SHORT.replace("lr", "keep_zeros=true,lr"))
    assert not better.params[name][~mask].any() and not np.array_equal(better.params[name], sparse.params[name])


def test_labels_alone_train_with_qat_and_the_accuracy_is_what_progress_shows() -> None:
    teacher = net()
    student, data, shown = quantized(teacher, weights=("int4",)), samples(teacher, 160, labels=True), []
    case = Case(student, teacher, data, progress=lambda stage, done, total: shown.append(stage))
    found = recovered(case, "qat{epochs=6,batch=16,lr=0.003,threads=1}")
    assert isinstance(found.recipe, Qat) and found.after and found.before and found.after.value < found.before.value
    assert f"recovering: held-out score {found.after.score:.4f}, loss {found.after.value:.4g}" in shown


def test_features_of_the_teacher_alone_can_teach() -> None:
    teacher = net()
    student = quantized(teacher, weights=("int4",))
    better = recover(student, teacher, samples(teacher, 160), SHORT.replace("lr", "logits=0,features=1,lr"))
    value = next(of_op(teacher, "Gemm")).inputs[0]
    assert value in teacher.producer and divergence(better, teacher, samples(teacher, 48, seed=9)) < divergence(
        student, teacher, samples(teacher, 48, seed=9)
    )


def test_the_users_own_loader_and_loss_train() -> None:
    teacher = net()
    student, data = quantized(teacher, weights=("int4",)), samples(teacher, 128)
    name, output = teacher.inputs[0], teacher.outputs[0]
    asked = []

    def loss(found: Any, wanted: Any, labels: Any) -> Any:
        asked.append(labels)
        return (found[output] - wanted[output]).square().mean()

    tensors = torch.from_numpy(np.array(data.arrays[name]))
    pairs = torch.utils.data.TensorDataset(tensors, torch.arange(128))
    mixed = torch.Generator().manual_seed(1)
    loaders = (
        torch.utils.data.DataLoader(pairs, batch_size=16, shuffle=True),
        torch.utils.data.DataLoader(pairs, batch_size=16, shuffle=True, generator=mixed),
        [({name: data.arrays[name][i : i + 16]}, np.arange(i, i + 16)) for i in range(0, 128, 16)],
        lambda epoch: [{name: data.arrays[name][i : i + 16]} for i in range(0, 128, 16)],
        functools.partial(lambda step, epoch: [{name: data.arrays[name][i : i + step]} for i in range(0, 128, step)], 16),
    )
    for loader in loaders:
        asked.clear()
        once, again = (recover(student, teacher, loader, f"{SHORT[:-1]},holdout=0.3}}", loss=loss) for _ in range(2))
        assert once.digest == again.digest != student.digest
        assert divergence(once, teacher, samples(teacher, 48, seed=9)) < divergence(
            student, teacher, samples(teacher, 48, seed=9)
        )
        assert (asked[0] is None) == callable(loader)


@pytest.mark.parametrize("shuffle", [False, True])
def test_what_chooses_of_a_loader_is_never_trained_on(shuffle: bool) -> None:
    from hwopt.recover.data import names_of

    teacher = net()
    images = torch.from_numpy(np.array(samples(teacher, 60).arrays[teacher.inputs[0]]))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, torch.arange(60)), batch_size=6, shuffle=shuffle)
    rest, judged = divided(source_of(teacher, loader), None, 0.2, 6, 1)
    held = {name for batch in judged for name in names_of(batch)}
    assert len(held) == 12 and rest.steps(6) == 8
    seen = [batch for seed in (0, 1000) for epoch in range(3) for batch in rest.epoch(epoch, 6, seed)]  # as schedules train
    assert len(seen) == 48 and all(len(batch) == 6 for batch in seen)
    assert not held & {name for batch in seen for name in names_of(batch)}
    for batch in seen:  # labels stay with their samples
        assert batch.labels is not None and np.array_equal(batch.feeds[teacher.inputs[0]], images.numpy()[batch.labels])


def test_labels_of_a_loader_may_have_an_axis_of_their_own() -> None:
    teacher, data = net(), samples(net(), 64, labels=True)
    student, name = quantized(teacher, weights=("int4",)), teacher.inputs[0]
    flat = [({name: data.arrays[name][i : i + 16]}, data.labels[i : i + 16]) for i in range(0, 64, 16)]
    deep = [(feeds, labels[:, None]) for feeds, labels in flat]
    flat_checks, deep_checks = (recovered(Case(student, teacher, one), SHORT).checks for one in (flat, deep))
    assert flat_checks == deep_checks


def test_the_teacher_says_the_same_bits_whichever_samples_it_is_asked_about() -> None:
    from hwopt.recover.torch.teacher import Teacher

    graph, found = net(), []
    source = source_of(graph, samples(graph, 700))
    for rows in (np.arange(700), np.arange(0, 700, 9)):
        teacher = Teacher(graph)
        teacher.remember(source, rows, lambda *_: None)
        found.append(teacher(source.at(np.arange(0, 700, 9)))[graph.outputs[0]])
    assert torch.equal(*found)


def test_a_loader_that_repeats_one_batch_leaves_nothing_to_train_on() -> None:
    teacher = net()
    batch = {name: array[:8] for name, array in samples(teacher).arrays.items()}
    with pytest.raises(DataError, match="among those that are held out"):
        recover(quantized(teacher), teacher, [batch] * 4)
    rest, judged = divided(source_of(teacher, [batch]), None, 0.2, 8, 1)
    assert rest.steps(8) == 1 and not judged


def test_data_that_cannot_be_trained_on_are_refused() -> None:
    teacher = net()
    student, name = quantized(teacher), teacher.inputs[0]
    one = np.zeros((4, 3, 6, 6), np.float32)
    with pytest.raises(UsageError, match="only once"):
        recover(student, teacher, iter([{name: one}]))
    with pytest.raises(DataError, match="lacks input"):
        recover(student, teacher, [{"other": one}])
    with pytest.raises(DataError, match="shape"):
        recover(student, teacher, [{name: one[:, :2]}])
    with pytest.raises(DataError, match="no classes"):
        recover(student, teacher, [({name: one + i}, np.full(4, 0.5)) for i in range(4)], "qat{epochs=1}")
    with pytest.raises(DataError, match=r"labels \[4, 4\]"):
        recover(student, teacher, [({name: one + i}, np.eye(4, dtype=np.int64)) for i in range(4)])
    with pytest.raises(DataError, match="labels are <U1"):
        recover(student, teacher, [({name: one + i}, np.array(list("abcd"))) for i in range(4)])
    with pytest.raises(DataError, match="no torch number"):
        recover(student, teacher, [{name: one}, {name: one + 1}], loss=lambda found, wanted, labels: 1.0)


def test_training_that_explodes_never_writes_numbers_that_mean_nothing() -> None:
    teacher = net()
    student = quantized(teacher)
    with pytest.raises(PassError, match="means nothing"):
        recover(student, teacher, samples(teacher), "distill{steps=4,until=4,batch=16,lr=1e30,warmup=0,threads=1}")


def test_without_torch_recovery_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None)
    with pytest.raises(ToolchainError, match=r"hwopt\[torch\]"):
        recover(net(), net(), samples(net()))


def test_recipes_and_cases_need_no_torch() -> None:
    import subprocess

    code = "import sys, hwopt.recover as r; r.parse_recipe('qat'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=Path(__file__).parents[1]).returncode == 0


def test_distill_is_the_usual_recipe() -> None:
    assert parse_recipe("distill") == Distill()


def test_weights_of_half_precision_are_trained_in_single_and_written_in_their_own() -> None:
    from hwopt.recover.torch.student import Student, written

    teacher = net()
    graph = quantized(teacher, dtype="bf16")
    student = Student(graph)
    assert written(graph, student.arrays(), "test") is graph
    assert {one.dtype for one in student.parameters()} == {torch.float32}
    better = recover(graph, teacher, samples(teacher, 160), SHORT.replace("0.003", "0.0003"))
    assert better is not graph and shape_of(better) == shape_of(graph)


def test_a_loss_of_the_users_is_in_the_recipe_by_name() -> None:
    teacher = net()
    case = Case(quantized(teacher, weights=("int4",)), teacher, samples(teacher), loss=squares)
    found = recovered(case, SHORT)
    assert found.recipe.loss == "tests.test_recover:squares"
    assert recovered(dataclasses.replace(case, loss=None), str(found.recipe)).graph.digest == found.graph.digest
    with pytest.raises(UsageError, match="cannot import the loss"):
        recovered(dataclasses.replace(case, loss=None), "distill{loss=nowhere:loss}")


def squares(found: Any, wanted: Any, labels: Any) -> Any:
    (name,) = wanted
    return (found[name] - wanted[name]).square().mean()


def test_a_loss_without_a_name_of_its_own_is_called_by_its_class() -> None:
    class Squares(torch.nn.Module):
        def forward(self, found: Any, wanted: Any, labels: Any) -> Any:
            return squares(found, wanted, labels)

    teacher = net()
    found = recovered(Case(quantized(teacher, weights=("int4",)), teacher, samples(teacher), loss=Squares()), SHORT)
    assert found.recipe.loss.endswith("Squares") and parse_recipe(str(found.recipe)) == found.recipe


def test_held_out_samples_come_in_batches_of_a_model_that_takes_no_other() -> None:
    build = Builder(np.random.default_rng(0))
    hidden = build.op("MatMul", [build.input((10, 8)), build.weight(8, 6, fan_in=8)], (10, 6))
    build.outputs.append(build.op("Add", [hidden, build.weight(10, 6, fan_in=4)], (10, 6)))
    teacher = build.graph()
    data = random_samples(teacher, count=900)
    student = run_pass(Quantize(), teacher, Context(calibration=data.head(20)))
    found = recovered(Case(student, teacher, data), "distill{steps=2,threads=1}")
    assert found.before is not None and np.isfinite(found.before.value)


def test_labels_that_are_asked_for_and_missing_are_an_error() -> None:
    teacher = net()
    with pytest.raises(UsageError, match=r"hard=0\.5 needs labels"):
        recovered(Case(quantized(teacher), teacher, samples(teacher)), "distill{hard=0.5}")


@pytest.mark.parametrize("shape", [(6, 5), (6, 7, 5), (6, 5, 4, 3)], ids=["classes", "tokens", "pixels"])
def test_hard_labels_choose_a_class_for_every_place_of_an_output(shape: tuple[int, ...]) -> None:
    from hwopt.recover.torch.losses import Distance

    axis = 1 if len(shape) == 4 else len(shape) - 1
    places = [size for place, size in enumerate(shape) if place != axis]
    labels = torch.from_numpy(np.random.default_rng(1).integers(0, 5, places))
    right = torch.nn.functional.one_hot(labels, 5).movedim(-1, axis) * 20.0
    kind = "logits" if len(shape) == 2 else "values"
    distance = Distance(parse_recipe("distill{hard=1,logits=0}"), {"y": kind})
    assert float(distance({"y": right}, {"y": right}, labels)) < 1e-6 < 1 < float(distance({"y": -right}, {"y": right}, labels))
    with pytest.raises(DataError, match="no cross entropy"):
        distance({"y": right}, {"y": right}, labels[:, None].repeat(1, 2, *[1] * (labels.ndim - 1)))
