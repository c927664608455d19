"""Differentiable k-means: the paper's formulas, codes that move, integers that are written back."""

from __future__ import annotations

import numpy as np
import pytest

from hwopt.backends.ort import run
from hwopt.ir import Graph, of_op
from hwopt.pipeline import Context, run_pass
from hwopt.recover import Case, Dkm, parse_recipe, recovered
from hwopt.recover.palettes import pack, palettes_of, weights_before
from passes._packing import pack as stored_by_passes
from passes.prune_channels import PruneChannels
from passes.quantize import Quantize
from passes.quantize_weights import QuantizeWeights
from passes.share_weights import ShareWeights
from tests._recover import blobs, divergence, net, samples, shape_of, trained_net

torch = pytest.importorskip("torch")
RECIPE = "dkm{epochs=4,batch=16,lr=0.003,threads=1,checks=3}"


def shared(teacher: Graph, bits: int = 2, **options: object) -> Graph:
    return run_pass(ShareWeights(bits=bits, site=tuple(n.name for n in of_op(teacher, "Conv")), **options), teacher, Context())


def test_assignments_and_entries_are_those_of_the_paper() -> None:
    """Cho et al. 2022: a_ij = exp(-|w_i - c_j| / tau) / sum_j, c_j = sum_i a_ij w_i / sum_i a_ij, W = A c."""
    from hwopt.recover.torch.palettes import assigned, means

    weights = torch.tensor([[-1.1, -0.8, 0.1, 0.9, 1.3]], dtype=torch.float64, requires_grad=True)
    book, tau = torch.tensor([[-1.0, 0.2, 1.0]], dtype=torch.float64), torch.tensor([[[0.4]]], dtype=torch.float64)

    def palette(one: torch.Tensor) -> torch.Tensor:
        shares = assigned(one, book, tau)
        entries = means(one, shares, book)
        return torch.bmm(assigned(one, entries, tau), entries.unsqueeze(2)).squeeze(2)

    w, c = weights.detach().numpy()[0], book.numpy()[0]
    shares = np.exp(-np.abs(w[:, None] - c) / 0.4)
    shares /= shares.sum(1, keepdims=True)
    entries = (shares * w[:, None]).sum(0) / shares.sum(0)
    again = np.exp(-np.abs(w[:, None] - entries) / 0.4)
    wanted = (again / again.sum(1, keepdims=True)) @ entries
    np.testing.assert_allclose(assigned(weights, book, tau).detach().numpy()[0], shares, rtol=1e-12)
    np.testing.assert_allclose(means(weights, assigned(weights, book, tau), book).detach().numpy()[0], entries, rtol=1e-12)
    np.testing.assert_allclose(palette(weights).detach().numpy()[0], wanted, rtol=1e-12)
    assert torch.autograd.gradcheck(palette, (weights,))


def test_a_student_in_training_computes_the_soft_palette_and_sends_gradients_to_the_weights() -> None:
    from hwopt.recover.torch.palettes import PaletteStudent, assigned, means

    teacher = net()
    graph = shared(teacher)
    student = PaletteStudent(graph, teacher, Dkm(rounds=1, softness=0.5))
    name, one = next(iter(student.palettes.items()))
    weights = student.value_of(name)
    soft = student._start({graph.inputs[0]: np.zeros((1, 3, 6, 6), np.float32)})[name]
    book = torch.from_numpy(graph.params[one.codebook][None].copy())
    tau = 0.5 * (book.max() - book.min()) / 3
    flat = weights.detach().reshape(1, -1)
    entries = means(flat, assigned(flat, book, tau), book)
    wanted = (assigned(flat, entries, tau) @ entries[0]).reshape(soft.shape)
    torch.testing.assert_close(soft.detach(), wanted)
    soft.square().sum().backward()
    assert weights.grad is not None and float(weights.grad.abs().max()) > 0
    before = student.value_of(one.codebook).clone()
    student.constrain()
    torch.testing.assert_close(student.value_of(one.codebook), entries[0])
    assert not torch.equal(before, student.value_of(one.codebook))


@pytest.mark.parametrize("options", [{"bits": 2}, {"bits": 3}, {"bits": 2, "axis": "channel-group", "group": 4}])
def test_palettes_are_found_with_their_codes_and_with_the_weights_that_they_replace(options: dict) -> None:
    teacher = net()
    graph = shared(teacher, **options)
    found = list(palettes_of(graph))
    assert len(found) == len(list(of_op(teacher, "Conv")))
    for one in found:
        book = graph.params[one.codebook].reshape(len(one.codes), -1)
        weights = weights_before(one, graph, teacher)
        assert weights is not None
        error = np.abs(np.take_along_axis(book, one.codes, 1) - weights)
        np.testing.assert_allclose(error, np.abs(weights[..., None] - book[:, None]).min(2), atol=1e-6)


@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_codes_are_packed_as_the_pass_packs_them(width: int) -> None:
    codes = np.random.default_rng(0).integers(0, 2**width, 21)
    np.testing.assert_array_equal(pack(codes, width), stored_by_passes(codes, width).ravel())


@pytest.mark.parametrize("quantize", [False, True])
def test_codes_and_entries_are_trained_and_the_structure_stays(quantize: bool) -> None:
    teacher, data = trained_net(), blobs(240, 1)
    graph = shared(teacher)
    graph = run_pass(Quantize(), graph, Context(calibration=data.head(16))) if quantize else graph
    case = Case(graph, teacher, data)
    found = recovered(case, RECIPE)
    assert found.graph is not graph and shape_of(found.graph) == shape_of(graph)
    before, after = list(palettes_of(graph)), list(palettes_of(found.graph))
    assert all(np.any(one.codes != other.codes) for one, other in zip(before, after, strict=True))
    assert all(np.any(graph.params[one.codebook] != found.graph.params[one.codebook]) for one in before)
    fresh = blobs(120, 9)
    assert divergence(found.graph, teacher, fresh) < 0.8 * divergence(graph, teacher, fresh)
    assert recovered(case, str(found.recipe)).graph.digest == found.graph.digest


def test_checks_look_at_the_graph_that_is_written() -> None:
    from hwopt.recover.torch.palettes import PaletteStudent
    from hwopt.recover.torch.student import written

    teacher = net()
    for graph in (shared(teacher), run_pass(Quantize(), shared(teacher), Context(calibration=samples(teacher, 16)))):
        student, random = PaletteStudent(graph, teacher, Dkm()), torch.Generator().manual_seed(0)
        assert written(graph, student.arrays(), "test") is graph
        with torch.no_grad():
            for name in student.palettes:
                one = student.value_of(name)
                one.add_(0.3 * one.std() * torch.randn(one.shape, generator=random))
        after, feeds = written(graph, student.arrays(), "test"), next(iter(samples(teacher, 1, seed=3).feeds(teacher)))
        with torch.no_grad():
            found = student(feeds)[graph.outputs[0]].numpy()
        np.testing.assert_allclose(found, run(after, feeds)[graph.outputs[0]], rtol=1e-4, atol=1e-5)
        assert np.abs(found - run(graph, feeds)[graph.outputs[0]]).max() > 1e-3


def test_numbers_of_three_bits_that_are_stored_as_codes_keep_them() -> None:
    from hwopt.recover.torch.palettes import PaletteStudent

    graph = run_pass(QuantizeWeights(bits=3), net(width=24), Context())
    assert list(palettes_of(graph)) and not PaletteStudent(graph, net(width=24), Dkm()).palettes
    assert PaletteStudent(shared(net()), net(), Dkm()).palettes


def test_the_same_seed_gives_the_same_codes_and_nothing_worse_is_given_back() -> None:
    teacher, data = trained_net(), blobs(160, 1)
    case = Case(shared(teacher), teacher, data)
    once, again, other = (recovered(case, text).graph for text in (RECIPE, RECIPE, RECIPE.replace("lr", "seed=3,lr")))
    assert once.digest == again.digest != other.digest
    wild = recovered(case, "dkm{epochs=1,batch=16,lr=30,warmup=0,threads=1,checks=1}")
    assert wild.graph is case.graph or (wild.after and wild.before and wild.after.value < wild.before.value)


def test_without_a_palette_dkm_trains_what_there_is() -> None:
    teacher = trained_net()
    pruned = run_pass(PruneChannels(ratio=0.5), teacher, Context())
    assert not list(palettes_of(pruned))
    dkm, distill = (recovered(Case(pruned, teacher, blobs(160, 1)), f"{name}{RECIPE[3:]}").graph for name in ("dkm", "distill"))
    for name in pruned.params:
        np.testing.assert_array_equal(dkm.params[name], distill.params[name])
    assert dkm.digest != pruned.digest and parse_recipe("dkm:softness=0.1") == Dkm(softness=0.1)
