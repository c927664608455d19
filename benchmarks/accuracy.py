"""Suite `accuracy`: what compression costs on real tasks, on the libraries that ship (never in another runtime).

EfficientNet-Lite0 names ImageNet pictures, MiniLM judges the likeness of texts as people do, the demo model names clothes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from benchmarks import texts
from benchmarks.fashion import dataset
from benchmarks.layout import Row, higher_is_better, result
from benchmarks.zoo import ZOO, Case, Missing
from hwopt.artifact import Artifact
from hwopt.compiler import compile_model
from hwopt.demo import SHAPES, demo_data, run_demo
from hwopt.errors import UsageError, did_you_mean
from hwopt.evaluate import compare

PLAIN = {"float": "none", "int8": "quantize{}"}
PICTURE_FORMS = {**PLAIN, "int8_auto": "quantize{calibrator=auto}"}
FOUR_BITS = {
    "float": "none",
    "nearest": "quantize{weights=int4,correct_bias=false}",
    "bias_corrected": "quantize{weights=int4}",
    "equalized": "equalize{},quantize{weights=int4}",
    "smooth": "smooth{},quantize{weights=int4}",
    "adaround": "quantize{weights=int4,rounding=adaround}",
    "reconstruction": "quantize{weights=int4,rounding=block}",
}
TEXTS = {
    "float": "none",
    "int8": "quantize{}",
    "int8_smooth": "smooth{},quantize{}",
    "int8_dynamic": "quantize{dynamic=true}",
    "int4_nearest": "quantize-weights{bits=4}",
    "int4_gptq": "quantize-weights{bits=4,method=gptq,act_order=true}",
    "int4_groups_nearest": "quantize-weights{bits=4,group=32}",
    "int4_groups_gptq": "quantize-weights{bits=4,group=32,method=gptq,act_order=true}",
}
RESAMPLES = 1000
PICTURES = Path(__file__).resolve().parents[2] / "shared" / "data" / "imagenet_sample"
FASHION = Path("/usr/share/datasets/fashion-mnist")  # Debian: dataset-fashion-mnist
Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Setting:
    """Where the data lie, where artifacts may be written, and with how many threads they run."""

    pictures: Path
    scratch: Path
    threads: int | None


@dataclass
class Findings:
    rows: list[Row] = field(default_factory=list)
    summary: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def top_one(self, name: str, right: Mapping[str, np.ndarray]) -> None:
        """Rows and paired comparisons with `float` of every variant, given 1 or 0 for each sample."""
        base = right["float"]
        for variant, found in right.items():
            if variant == "float":
                continue
            pair = compare("top-1 accuracy", base, found)
            self.rows.append(higher_is_better(f"{name} {variant}", pair.metric, "1", pair.score, {"hwopt float": pair.baseline}))
            low, high = pair.interval or (None, None)
            figures = {
                "drop": pair.drop, "drop_low": low, "drop_high": high, "samples": pair.samples,
                "right_to_wrong": pair.right_to_wrong, "wrong_to_right": pair.wrong_to_right, "mcnemar_p": pair.mcnemar_p,
            }  # fmt: skip
            self.summary |= {f"{name}_{variant}_{key}": value for key, value in figures.items() if value is not None}


def run(threads: int | None = None, models: str | None = None, data: Path | None = None) -> dict[str, Any]:
    """`models`: only these, joined by commas; `data`: the folder of ImageNet pictures named by their class."""
    chosen = models.split(",") if models else list(TASKS)
    for name in chosen:
        if name not in TASKS:
            raise UsageError(f"unknown model {name!r}", place="--models", hint=did_you_mean(name, TASKS))
    findings = Findings()
    for name in chosen:
        with tempfile.TemporaryDirectory(prefix="hwopt-accuracy-") as scratch:
            try:
                TASKS[name](findings, Setting(data or PICTURES, Path(scratch), threads))
            except Missing as error:
                findings.notes.append(f"{name} is left out: {error}")
    return result("accuracy", findings.rows, findings.summary, findings.notes)


def artifacts(
    case: Case,
    calibrate: Arrays,
    evaluate: Arrays,
    setting: Setting,
    variants: Mapping[str, str] = PLAIN,
    *,
    measure: bool = True,
) -> dict[str, Artifact]:
    """The model compiled once for each variant, name -> passes: as it is, and with everything quantized that can be."""
    return {
        name: compile_model(
            case.model, out=setting.scratch / name, shapes=case.shapes, calibrate=calibrate, evaluate=evaluate, passes=passes,
            threads=setting.threads, measure=measure,
        )
        for name, passes in variants.items()
    }  # fmt: skip


def outputs(artifact: Artifact, arrays: Arrays, batch: int = 1) -> np.ndarray:
    """The first output for every sample, computed by the artifact's library."""
    count = len(next(iter(arrays.values())))
    if count % batch:
        raise ValueError(f"{count} samples do not fill batches of {batch}")
    feeds = ({name: array[start : start + batch] for name, array in arrays.items()} for start in range(0, count, batch))
    return np.concatenate([next(iter(artifact.run(one).values())) for one in feeds])


def top_one(artifact: Artifact, arrays: Arrays, labels: np.ndarray) -> np.ndarray:
    """1 for every sample whose largest output is its label."""
    return (outputs(artifact, arrays).argmax(1) == labels).astype(np.float64)


def imagenet(setting: Setting) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pictures, their classes, and which of them count: those of every fourth class calibrate. Raises Missing."""
    files = sorted(setting.pictures.glob("*.jpg"))
    if not files:
        raise Missing("there are no pictures", place=str(setting.pictures), hint="give --data FOLDER with NNNN.jpg by class")
    labels = np.array([int(path.stem) for path in files])
    return read_pictures(files), labels, labels % 4 != 0


def efficientnet(findings: Findings, setting: Setting) -> None:
    """The whole network in 8 bits."""
    pictures, labels, judged = imagenet(setting)
    case = ZOO["efficientnet_lite0"](1)
    few = {"inputs": pictures[judged][:8]}
    built = artifacts(case, {"inputs": pictures[~judged]}, few, setting, PICTURE_FORMS)
    right = {name: top_one(one, {"inputs": pictures[judged]}, labels[judged]) for name, one in built.items()}
    findings.top_one("efficientnet_lite0", right)
    layers = [layer for layer in built["int8"].report["layers"] if layer["op"] == "Conv"]
    integer = [layer for layer in layers if layer["dtype"] == "int8"]
    findings.summary |= {"efficientnet_lite0_convs": len(layers), "efficientnet_lite0_integer_convs": len(integer)}
    findings.rows.append(
        higher_is_better("efficientnet_lite0 int8", "integer convs", "kernels", len(integer), {"convs": len(layers)})
    )


def efficientnet_int4(findings: Findings, setting: Setting) -> None:
    """Weights in 4 bits, activations in 8: what each method takes back of what rounding to the nearest costs."""
    pictures, labels, judged = imagenet(setting)
    few = {"inputs": pictures[judged][:8]}
    case = ZOO["efficientnet_lite0"](1)
    built = artifacts(case, {"inputs": pictures[~judged]}, few, setting, FOUR_BITS, measure=False)
    right = {name: top_one(one, {"inputs": pictures[judged]}, labels[judged]) for name, one in built.items()}
    findings.top_one("efficientnet_lite0_int4", right)
    for name in (name for name in FOUR_BITS if name not in ("float", "nearest")):
        share = recovered(right["float"], right["nearest"], right[name])
        if share is not None:
            found = dict(zip(("recovered", "recovered_low", "recovered_high"), share, strict=True))
            findings.summary |= {f"efficientnet_lite0_int4_{name}_{key}": value for key, value in found.items()}


def recovered(before: np.ndarray, nearest: np.ndarray, found: np.ndarray) -> tuple[float, float, float] | None:
    """The share of what `nearest` loses that `found` does not, with its 95 % interval by resampling; None if nothing is lost."""
    if before.mean() <= nearest.mean():
        return None
    random, shares = np.random.default_rng(0), []
    for _ in range(RESAMPLES):
        rows = random.integers(0, len(before), len(before))
        lost = float((before[rows] - nearest[rows]).mean())
        if lost > 0:
            shares.append(1 - float((before[rows] - found[rows]).mean()) / lost)
    low, high = np.percentile(shares, (2.5, 97.5))
    return 1 - float((before.mean() - found.mean()) / (before.mean() - nearest.mean())), float(low), float(high)


def read_pictures(files: list[Path]) -> np.ndarray:
    """[n, 3, 224, 224] float32, RGB, (x - 127) / 128 as the network was trained."""
    try:
        from PIL import Image
    except ImportError as error:
        raise Missing("pictures need the package pillow", place="efficientnet_lite0") from error
    arrays = [np.asarray(Image.open(path).convert("RGB"), np.float32) for path in files]
    return np.ascontiguousarray(((np.stack(arrays) - 127) / 128).transpose(0, 3, 1, 2))


def minilm(findings: Findings, setting: Setting) -> None:
    """Correlation of the embeddings' cosines with what people said, calibrated on other texts."""
    encode, (lee, background), words = texts.encoder(), texts.lee50(), texts.wordsim353()
    case = ZOO["minilm"](1)
    built = artifacts(case, encode(texts.calibration(background)), encode(lee.texts[:8]), setting, TEXTS, measure=False)
    for name, judgements, measures in (
        ("lee50", lee, {"pearson": stats.pearsonr, "spearman": stats.spearmanr}),
        ("wordsim353", words, {"spearman": stats.spearmanr}),
    ):
        cosines = {key: judgements.cosines(outputs(one, encode(judgements.texts))) for key, one in built.items()}
        for measure, correlation in measures.items():
            value = {key: float(correlation(found, judgements.likeness).statistic) for key, found in cosines.items()}
            findings.summary |= {f"minilm_{key}_{name}_{measure}": one for key, one in value.items()}
            for key, found in cosines.items():
                if key == "float":
                    continue
                row = higher_is_better(f"minilm {key}", f"{name} {measure}", "1", value[key], {"hwopt float": value["float"]})
                findings.rows.append(row)
                low, high = drop_interval(cosines["float"], found, judgements.likeness, correlation)
                drop = {"drop": value["float"] - value[key], "drop_low": low, "drop_high": high}
                findings.summary |= {f"minilm_{key}_{name}_{measure}_{what}": one for what, one in drop.items()}
    layers = [layer for layer in built["int8"].report["layers"] if layer["op"] in ("MatMul", "Gemm")]
    findings.summary["minilm_products"] = len(layers)
    findings.summary["minilm_integer_products"] = sum(layer["dtype"] == "int8" for layer in layers)


def drop_interval(
    before: np.ndarray, after: np.ndarray, likeness: np.ndarray, correlation: Callable[..., Any]
) -> tuple[float, float]:
    """95 % interval of how much less `after` correlates with `likeness` than `before`, by resampling the judged pairs."""
    random = np.random.default_rng(0)
    drops = []
    for _ in range(RESAMPLES):
        rows = random.integers(0, len(likeness), len(likeness))
        first, second = (float(correlation(one[rows], likeness[rows]).statistic) for one in (before, after))
        drops.append(first - second)
    low, high = np.percentile(drops, (2.5, 97.5))
    return float(low), float(high)


def demo(findings: Findings, setting: Setting) -> None:
    """The embedded model, quantized only and as the whole plan makes it: on the embedded images, on the whole test set, and on
    that part of it by which nothing was chosen."""
    calibrate, evaluate = demo_data()
    labels = evaluate["labels"]
    case = Case("demo", ZOO["demo"](1).model, SHAPES, calibrate)
    built = artifacts(case, calibrate, evaluate, setting)
    run_demo(setting.scratch / "plan", threads=setting.threads)
    built["plan"] = Artifact(setting.scratch / "plan")
    images = {"image": evaluate["image"]}
    findings.top_one("demo_4000", {name: top_one(one, images, labels) for name, one in built.items()})
    if not FASHION.is_dir():
        findings.notes.append(f"demo on 10,000 images is left out: there is no {FASHION}")
        return
    pixels, labels = dataset(FASHION, "t10k")
    images = {"image": pixels[:, None].astype(np.float32) / 255}
    right = {name: top_one(one, images, labels) for name, one in built.items()}
    findings.top_one("demo_10000", right)
    unseen = slice(len(evaluate["image"]), None)  # the embedded images are the first ones, and the plan was chosen on them
    findings.top_one("demo_6000_unseen", {name: found[unseen] for name, found in right.items()})


TASKS: Mapping[str, Callable[[Findings, Setting], None]] = {
    "efficientnet_lite0": efficientnet, "efficientnet_lite0_int4": efficientnet_int4, "minilm": minilm, "demo": demo,
}  # fmt: skip
