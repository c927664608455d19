"""How robust a model is: pictures and letters that are damaged, and attacks within a box."""

from __future__ import annotations

import dataclasses
from types import MappingProxyType

import numpy as np
import pytest

from hwopt.backends.ort import Session
from hwopt.errors import DataError, ToolchainError, UsageError
from hwopt.evaluation.attacks import Attacker, Box, box_of
from hwopt.evaluation.corruptions import corrupted, parse_corruptions, parse_severities
from hwopt.evaluation.letters import misspelled
from hwopt.evaluation.outputs import pair_of
from hwopt.evaluation.pixels import pixels_of
from hwopt.evaluation.robust import Trials, check_trials, corruption_rows
from hwopt.evaluation.subject import Subject
from hwopt.io.preprocess import folded, parse_preprocess
from hwopt.ir import Graph
from hwopt.job import quiet
from hwopt.samples import Samples, checked, samples_of
from tests.test_compiler import pictures, small_net

UNIT = np.random.default_rng(3).random((3, 12, 10, 3), np.float32)


def test_attacks_without_torch_are_refused_before_long_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ToolchainError, match="needs torch"):
        check_trials(Trials(attacks=("fgsm",)), Samples({"x": UNIT}))
    check_trials(Trials(), Samples({"x": UNIT}))


@pytest.mark.parametrize("name", parse_corruptions("images"))
def test_a_corruption_changes_more_with_its_severity_and_repeats_from_its_seed(name: str) -> None:
    smooth = np.linspace(0.2, 0.8, 120, dtype=np.float32).reshape(1, 12, 10, 1) * np.ones((3, 1, 1, 3), np.float32)
    pictures = smooth if name in ("shot-noise", "gaussian-noise") else UNIT
    changes = [float(np.square(corrupted(pictures, name, severity, 0) - pictures).mean()) for severity in (1, 3, 5)]
    assert 0 < changes[0] < changes[1] < changes[2]
    np.testing.assert_array_equal(corrupted(pictures, name, 2, 1), corrupted(pictures, name, 2, 1))
    result = corrupted(pictures, name, 5, 0)
    assert result.shape == pictures.shape and result.min() >= 0 and result.max() <= 1


def test_noise_has_the_deviation_of_the_benchmark_for_the_size_of_the_picture() -> None:
    gray = np.full((2, 32, 32, 1), 0.5, np.float32)
    assert (corrupted(gray, "gaussian-noise", 3, 0) - gray).std() == pytest.approx(0.08, rel=0.1)
    large = np.full((1, 96, 96, 1), 0.5, np.float32)
    assert (corrupted(large, "gaussian-noise", 1, 0) - large).std() == pytest.approx(0.08, rel=0.1)
    assert corrupted(large, "shot-noise", 1, 0).var() == pytest.approx(0.5 / 60, rel=0.1)


def test_contrast_keeps_the_mean_and_gray_pictures_stay_gray() -> None:
    found = corrupted(UNIT, "contrast", 5, 0)
    np.testing.assert_allclose(found.mean((1, 2)), UNIT.mean((1, 2)), atol=1e-5)
    assert corrupted(UNIT[..., :1], "jpeg", 1, 0).shape == (3, 12, 10, 1)


def test_names_of_corruptions_and_severities_are_read() -> None:
    assert parse_corruptions("noise, blur,noise") == ("gaussian-noise", "shot-noise", "blur")
    assert parse_severities("2-4") == (2, 3, 4) and parse_severities("1,5") == (1, 5)


def test_character_noise_changes_letters_alone_and_repeats_from_its_seed() -> None:
    texts = ["The quick brown fox jumps over 12 lazy dogs, twice!"] * 20
    few, many = misspelled(texts, 1, 0), misspelled(texts, 5, 0)
    wrong = [sum(a != b for a, b in zip(texts, noisy, strict=True)) for noisy in (few, many)]
    assert wrong[0] < wrong[1] == 20 and misspelled(texts, 5, 0) == many
    assert all("12" in text and text.endswith("!") for text in many)


def test_pixels_become_zero_to_one_and_back_in_either_layout() -> None:
    bytes_ = np.arange(2 * 3 * 16 * 16, dtype=np.uint64).reshape(2, 3, 16, 16).astype(np.uint8)
    graph = folded(small_net(), parse_preprocess("mean=1"))
    pixels = pixels_of(graph, Samples({"x": bytes_}))
    assert pixels.unit(bytes_).shape == (2, 16, 16, 3)
    np.testing.assert_array_equal(pixels.back(pixels.unit(bytes_), bytes_), bytes_)
    floats = Samples({"x": pictures(2, 0)["x"]})
    assert (
        pixels_of(small_net(), floats).white == 1
        and pixels_of(small_net(), Samples({"x": floats.arrays["x"] * 255})).white == 255
    )
    with pytest.raises(DataError, match=r"no brightnesses; give --preprocess"):
        pixels_of(small_net(), Samples({"x": floats.arrays["x"] - 0.5}))


def attacker(kind: str) -> tuple[Attacker, Samples]:
    graph, images = small_net(), pictures(4, 7)["x"]
    if kind == "bytes":
        graph, images = (
            folded(graph, parse_preprocess("scale=1/255,layout=nhwc")),
            np.rint(images.transpose(0, 2, 3, 1) * 255).astype(np.uint8),
        )
    samples = Samples(MappingProxyType({"x": images}), np.array([1, 2, 3, 4]))
    return Attacker(graph, samples, box_of(graph, samples, 8 / 255)), samples


@pytest.mark.parametrize("kind", ["floats", "bytes"])
@pytest.mark.parametrize("attack", ["fgsm", "pgd"])
def test_an_attack_stays_in_its_box_and_lowers_the_score_of_its_class(kind: str, attack: str) -> None:
    pytest.importorskip("torch")
    attacking, samples = attacker(kind)
    made, clean = attacking.attacked(attack, 5, 0, lambda done, total: None), samples.arrays["x"]
    assert made.dtype == clean.dtype and made.shape == clean.shape
    gap = np.abs(made.astype(np.float64) - clean).max()
    assert 0 < gap <= attacking.box.epsilon + 1e-6 and made.min() >= 0 and made.max() <= attacking.box.high
    session = Session(attacking.graph)
    sides = [np.concatenate([session.run({"x": one[None]})["y"] for one in images]) for images in (clean, made)]
    chances = [np.exp(y - y.max(1, keepdims=True)) / np.exp(y - y.max(1, keepdims=True)).sum(1, keepdims=True) for y in sides]
    assert (chances[1][range(4), samples.labels] < chances[0][range(4), samples.labels]).all()
    np.testing.assert_array_equal(made, attacking.attacked(attack, 5, 0, lambda done, total: None))


def test_a_fast_gradient_step_is_the_sign_of_the_gradient() -> None:
    torch = pytest.importorskip("torch")
    from hwopt.backends.torch import Module

    attacking, samples = attacker("floats")
    made = attacking.attacked("fgsm", 1, 0, lambda done, total: None)
    x = torch.from_numpy(samples.arrays["x"][:1]).requires_grad_(True)
    torch.nn.functional.cross_entropy(Module(small_net())({"x": x})["y"], torch.tensor([1])).backward()
    step = np.clip(samples.arrays["x"][0] + attacking.box.epsilon * np.sign(x.grad.numpy()[0]), 0, 1)
    np.testing.assert_allclose(made[0], step, atol=1e-6)


def test_a_model_of_token_numbers_has_nothing_to_attack() -> None:
    from tests.random_graphs import Builder

    build = Builder()
    table = build.param(np.ones((5, 3), np.float32))
    build.outputs = [build.op("Gather", [table, build.input((1, 2), name="ids", dtype="int64")], (1, 2, 3))]
    with pytest.raises(DataError, match="0 inputs take floats"):
        box_of(build.graph(), Samples({"ids": np.ones((2, 2), np.int64)}), 0.1)


def test_the_box_of_bytes_is_never_less_than_one_step() -> None:
    graph = folded(small_net(), parse_preprocess("mean=1"))
    found = box_of(graph, Samples({"x": np.zeros((2, 3, 16, 16), np.uint8)}), 0.001)
    assert found == Box("x", 1.0, 0.0, 255.0, True)


LENGTH, LETTERS = 12, " abcdefghijklmnopqrstuvwxyz"


def encode(texts: list[str]) -> dict[str, np.ndarray]:
    """One number for each letter, cut or filled up to LENGTH."""
    return {"ids": np.array([[max(LETTERS.find(letter), 0) for letter in text[:LENGTH].ljust(LENGTH)] for text in texts])}


def reader() -> Graph:
    """A model that tells texts with many vowels from others."""
    from tests.random_graphs import Builder

    build = Builder()
    table = build.param(np.array([[letter in "aeiou", letter not in "aeiou "] for letter in LETTERS], np.float32))
    letters = build.op("Gather", [table, build.input((1, LENGTH), name="ids", dtype="int64")], (1, LENGTH, 2))
    axes = build.param(np.array([1]))
    build.outputs = [build.op("ReduceSum", [letters, axes], (1, 2), keepdims=0)]
    return build.graph()


def test_character_noise_goes_through_the_tokenizer() -> None:
    graph, texts = reader(), np.array(["aeiou aeiou", "queueing aie", "rhythms", "bcdfg hjklm"] * 4)
    samples = samples_of({"texts": texts, "labels": np.array([0, 0, 1, 1] * 4)}, graph, encode=encode)
    runs = (Session(graph).run, Session(graph).run)
    subject = Subject(None, graph, graph, *runs)  # type: ignore[arg-type]  # no library is needed for this
    refused: list[dict[str, str]] = []
    trials = Trials(("characters", "blur"), (1, 5))
    rows = corruption_rows(subject, pair_of(subject, checked(samples, graph)), trials, quiet, refused)
    assert [(row["corruption"], row["severity"]) for row in rows] == [("characters", 1), ("characters", 5)]
    wrong = misspelled([str(text) for text in texts], 5, 0)
    answers = [int(Session(graph).run(encode([text]))[graph.outputs[0]].argmax()) for text in wrong]
    assert rows[1]["float"]["score"] == np.mean(np.array(answers) == samples.labels)
    assert refused == [
        {"what": "blur", "reason": f"{graph.name}: 0 inputs take pictures, [batch, 1 or 3, height, width] or the like"}
    ]
    with pytest.raises(UsageError, match="noise on characters needs the texts"):
        check_trials(trials, dataclasses.replace(samples, encode=None))
