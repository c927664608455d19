"""Recovery that stops: interrupted, resumed, out of time, no longer getting better; and statistics of batch normalizations."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hwopt.backends.ort import observing, run
from hwopt.errors import DataError
from hwopt.ir import Graph, of_op
from hwopt.recover import Case, Checkpoints, Outcome, recovered
from tests._recover import net, quantized, samples
from tests.random_graphs import Builder

torch = pytest.importorskip("torch")
RECIPE = "distill{epochs=6,batch=16,lr=0.003,threads=1,checks=5,patience=0}"


def case(checkpoints: Path | Checkpoints | None = None, **options: Any) -> Case:
    teacher = net()
    return Case(quantized(teacher, weights=("int4",)), teacher, samples(teacher), checkpoints=checkpoints, **options)


def interrupted_at(count: int, one: Case) -> Outcome:
    """The outcome when the user presses Ctrl-C at the check with this number."""
    seen = []

    def impatient(stage: str, done: int, total: int) -> None:
        seen.append(stage)
        if sum("score" in stage for stage in seen) == count and "score" in stage:
            raise KeyboardInterrupt

    return recovered(dataclasses.replace(one, progress=impatient), RECIPE)


def test_an_interrupted_training_keeps_its_best_state() -> None:
    whole, cut = recovered(case(), RECIPE), interrupted_at(4, case())
    assert cut.interrupted and not whole.interrupted
    assert cut.checks == whole.checks[:4] and cut.after == min(cut.checks, key=lambda check: check.value)
    assert cut.after.step and recovered(case(), str(cut.recipe)).graph.digest == cut.graph.digest


def test_a_resumed_training_ends_with_the_same_bits(tmp_path: Path) -> None:
    whole = recovered(case(), RECIPE)
    cut = interrupted_at(4, case(tmp_path))
    assert cut.interrupted and len(list(tmp_path.glob("*.pt"))) == 1
    steps: list[int] = []
    resumed = recovered(case(tmp_path, progress=lambda stage, done, total: steps.append(done)), RECIPE)
    assert resumed.graph.digest == whole.graph.digest and resumed.checks == whole.checks
    assert min(done for done in steps if done not in (0, 256)) > whole.checks[2].step


def test_a_finished_training_of_a_job_is_found_again_and_another_one_is_not_mistaken_for_it(tmp_path: Path) -> None:
    job = Checkpoints(tmp_path)
    first = recovered(case(job), RECIPE)
    shown: list[str] = []
    again = recovered(case(job, progress=lambda stage, done, total: shown.append(stage)), RECIPE)
    assert again.graph.digest == first.graph.digest and not shown
    other = recovered(case(job), RECIPE.replace("0.003", "0.002"))
    assert other.graph.digest != first.graph.digest and len(list(tmp_path.glob("*.pt"))) == 2


def test_checkpoints_are_removed_when_all_is_done_and_other_files_stay(tmp_path: Path) -> None:
    (tmp_path / "other.pt").write_bytes(b"not ours")
    interrupted_at(2, case(tmp_path))
    assert len(list(tmp_path.iterdir())) == 2
    recovered(case(tmp_path), RECIPE)
    assert [path.name for path in tmp_path.iterdir()] == ["other.pt"]


def test_a_checkpoint_that_fails_half_way_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hwopt.recover.torch.checkpoint import restore, save

    path = tmp_path / "state.pt"
    save(path, {"step": 1})

    def failing(state: Any, file: Path) -> None:
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", failing)
    with pytest.raises(KeyboardInterrupt):
        save(path, {"step": 2})
    assert restore(path) == {"step": 1} and list(tmp_path.iterdir()) == [path]
    path.write_bytes(b"damaged")
    with pytest.raises(DataError, match="remove it"):
        restore(path)


def test_training_ends_early_when_nothing_gets_better() -> None:
    found = recovered(case(), "distill{epochs=20,batch=16,lr=0.5,threads=1,checks=10,patience=2}")
    values = [check.value for check in found.checks]
    assert len(values) < 11 and values.index(min(values)) == len(values) - 3


def test_stated_minutes_plan_fewer_steps() -> None:
    found = recovered(case(), "distill{epochs=100000,batch=16,threads=1,checks=2,minutes=0.01}")
    assert 0 < found.recipe.steps < 100000 * 5 and found.recipe.minutes == 0
    free = recovered(case(), "distill{epochs=2,batch=16,threads=1,checks=2,minutes=60}")
    assert free.recipe.steps == 2 * (len(samples(net())) - 10) // 16 // 2 * 2


# Batch normalizations that could not be folded


def normalized() -> Graph:
    """Conv, Relu, BatchNormalization, pool, Gemm: the Relu keeps the two in the middle apart."""
    build = Builder(np.random.default_rng(0))
    x, shape = build.input((1, 3, 6, 6)), (1, 8, 6, 6)
    x = build.op("Conv", [x, build.weight(8, 3, 3, 3, fan_in=27), build.vector(8)], shape, pads=(1, 1, 1, 1))
    x = build.op("Relu", [x], shape)
    positive = build.param((0.5 + np.random.default_rng(1).random(8)).astype(np.float32))
    x = build.op("BatchNormalization", [x, build.vector(8, 1.0), build.vector(8), build.vector(8, 0.4), positive], shape)
    x = build.op("Flatten", [build.op("GlobalAveragePool", [x], (1, 8, 1, 1))], (1, 8))
    build.outputs.append(build.op("Gemm", [x, build.weight(4, 8, fan_in=1), build.vector(4)], (1, 4), transB=1))
    return build.graph()


def changed(graph: Graph) -> Graph:
    """The same with other weights in the first layer: what the normalization reads has other statistics."""
    edit = graph.edit()
    name = next(of_op(graph, "Conv")).inputs[1]
    edit.set_param(name, (graph.params[name] * 1.7).astype(np.float32))
    return edit.finish("changed")


def test_statistics_of_batch_normalizations_stay_while_the_rest_is_trained() -> None:
    teacher = normalized()
    student = changed(teacher)
    found = recovered(Case(student, teacher, samples(teacher)), RECIPE).graph
    node = next(of_op(found, "BatchNormalization"))
    same = [np.array_equal(found.params[name], student.params[name]) for name in node.inputs[1:]]
    assert same == [False, False, True, True]


def test_statistics_are_estimated_on_the_changed_graph_where_that_is_asked_for() -> None:
    from hwopt.recover.torch.statistics import estimate
    from hwopt.recover.torch.student import Student

    teacher, data = normalized(), samples(normalized(), 24)
    student = Student(changed(teacher))
    node = next(of_op(teacher, "BatchNormalization"))
    estimate(student, data.feeds(teacher))
    read = observing(changed(teacher), [node.inputs[0]])
    values = np.concatenate([run(read, feeds)[node.inputs[0]] for feeds in data.feeds(teacher)])
    np.testing.assert_allclose(student.value_of(node.inputs[3]), values.mean((0, 2, 3)), rtol=1e-4)
    np.testing.assert_allclose(student.value_of(node.inputs[4]), values.var((0, 2, 3)), rtol=1e-4)
    found = recovered(Case(changed(teacher), teacher, samples(teacher)), RECIPE.replace("lr", "statistics=estimated,lr"))
    before = changed(teacher).params
    assert not np.array_equal(found.graph.params[node.inputs[3]], before[node.inputs[3]])
    again = recovered(Case(changed(teacher), teacher, samples(teacher)), str(found.recipe))
    assert again.graph.digest == found.graph.digest


def test_estimated_statistics_count_as_a_change_of_the_graph_that_was_given() -> None:
    teacher = normalized()
    found = recovered(Case(teacher, teacher, samples(teacher)), RECIPE.replace("lr", "statistics=estimated,lr"))
    assert found.graph is teacher and found.before == found.after and found.before.value == 0


def test_another_loss_and_other_batches_of_a_loader_begin_anew(tmp_path: Path) -> None:
    def loss(found: Any, wanted: Any, _: Any) -> Any:
        return sum((found[name] - wanted[name]).abs().mean() for name in wanted)

    job = Checkpoints(tmp_path)
    batches = [{name: array[i : i + 16] for name, array in case().data.arrays.items()} for i in (0, 16)]
    others = [{name: -array for name, array in one.items()} for one in batches]
    loaders = [dataclasses.replace(case(job), data=one) for one in (batches, others)]
    for one in (case(job), case(job, loss=loss), *loaders):
        kept = len(list(tmp_path.glob("*.pt")))
        recovered(one, "distill{steps=2,threads=1}")
        assert len(list(tmp_path.glob("*.pt"))) == kept + 1
