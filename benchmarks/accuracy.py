"""Suite `accuracy`: what compression costs on real tasks and what recovery gives back, on the libraries that ship.

EfficientNet-Lite0 names ImageNet pictures, MiniLM judges the likeness of texts as people do, the demo model names clothes; then
palettes with and without training, and each way of training against its naive counterpart. Everything is scored on data
that nothing was calibrated with, trained on or chosen by, beside the float model, with 95 % intervals of the difference.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from benchmarks import texts, trainings
from benchmarks.fashion import dataset
from benchmarks.findings import FLOAT, Findings, Setting
from benchmarks.layout import higher_is_better, lower_is_better, result
from benchmarks.recovered import recovered as recovered_demo
from benchmarks.zoo import ZOO, Case, Missing
from hwopt.artifact import Artifact
from hwopt.compiler import compile_model
from hwopt.demo import SHAPES, demo_data, run_demo
from hwopt.errors import UsageError, did_you_mean

PLAIN = {FLOAT: "none", "int8": "quantize{}"}
PICTURE_FORMS = {
    **PLAIN,
    "int8_auto": "quantize{calibrator=auto}",
    "int4_nearest": "quantize{weights=int4,correct_bias=false}",
    "int4_bias_corrected": "quantize{weights=int4}",
    "int4_equalized": "equalize{},quantize{weights=int4}",
    "int4_smooth": "smooth{},quantize{weights=int4}",
    "int4_adaround": "quantize{weights=int4,rounding=adaround}",
    "int4_reconstruction": "quantize{weights=int4,rounding=block}",
}
NEAREST = "int4_nearest"
TEXTS = {
    **PLAIN,
    "int8_smooth": "smooth{},quantize{}",
    "int8_dynamic": "quantize{dynamic=true}",
    "int4_nearest": "quantize-weights{bits=4}",
    "int4_gptq": "quantize-weights{bits=4,method=gptq,act_order=true}",
    "int4_groups_nearest": "quantize-weights{bits=4,group=32}",
    "int4_groups_gptq": "quantize-weights{bits=4,group=32,method=gptq,act_order=true}",
}
CORRELATIONS = {"lee50": {"pearson": stats.pearsonr, "spearman": stats.spearmanr}, "wordsim353": {"spearman": stats.spearmanr}}
PAIRS = {"int4_gptq": "int4_nearest", "int4_groups_gptq": "int4_groups_nearest"}  # of the same size
QUICK_FORMS = (FLOAT, "int8", "int8_smooth", "int4_nearest", "int4_gptq", "int4_adaround")
CALIBRATING = 10  # of the pictures' classes those divisible by it: a fifth of the 500 even ones
RESAMPLES = 1000
PICTURES = Path(__file__).resolve().parents[2] / "shared" / "data" / "imagenet_sample"
FASHION = Path("/usr/share/datasets/fashion-mnist")  # Debian: dataset-fashion-mnist
Arrays = Mapping[str, np.ndarray]


def run(threads: int | None = None, models: str | None = None, data: Path | None = None, quick: bool = False) -> dict[str, Any]:
    """`models`: only these parts, joined by commas; `data`: the folder of ImageNet pictures named by their class, or that of
    Fashion-MNIST's four files. A part that cannot be had, or that fails, is noted, and the others go on.
    """
    chosen = models.split(",") if models else list(PARTS)
    for name in chosen:
        if name not in PARTS:
            raise UsageError(f"unknown part {name!r}", place="--models", hint=did_you_mean(name, PARTS))
    clothes = data is not None and any(data.glob("t10k-*"))
    pictures, fashion = (PICTURES, data) if clothes else (data, FASHION)
    findings = Findings()
    for name in chosen:
        findings.say(f"--- {name}: {(PARTS[name].__doc__ or '').partition(chr(10))[0]}")
        with tempfile.TemporaryDirectory(prefix="hwopt-accuracy-") as scratch:
            attempt(name, findings, Setting(pictures or PICTURES, fashion or FASHION, Path(scratch), threads, quick))
    return result("accuracy", findings.rows, findings.summary, findings.notes)


def attempt(name: str, findings: Findings, setting: Setting) -> None:
    """One part; what it found until it failed stays."""
    try:
        PARTS[name](findings, setting)
    except Missing as error:
        findings.note(f"{name} is left out: {error}")
    except Exception as error:  # whatever it is: hours of other parts must not be lost
        findings.note(f"{name} failed: {type(error).__name__}: {error}")
        findings.summary[f"{name}_failed"] = 1


def forms(all_of_them: Mapping[str, str], quick: bool) -> dict[str, str]:
    return {name: text for name, text in all_of_them.items() if not quick or name in QUICK_FORMS}


def compiled(case: Case, name: str, passes: str, calibrate: Arrays, evaluate: Arrays, setting: Setting) -> Artifact:
    """The model with these passes as stated; nothing is timed."""
    return compile_model(
        case.model, out=setting.scratch / name, shapes=case.shapes, calibrate=calibrate, evaluate=evaluate, passes=passes,
        threads=setting.threads, measure=False,
    )  # fmt: skip


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
    """Pictures, their classes, and which of them count: every fifth one calibrates, all others are scored. Raises Missing."""
    files = sorted(setting.pictures.glob("*.jpg"))
    if not files:
        raise Missing("there are no pictures", place=str(setting.pictures), hint="give --data FOLDER with NNNN.jpg by class")
    labels = np.array([int(path.stem) for path in files])
    return read_pictures(files), labels, labels % CALIBRATING != 0


def efficientnet(findings: Findings, setting: Setting) -> None:
    """EfficientNet-Lite0 in 8 bits; and with 4-bit weights: what each method takes back of what rounding to nearest costs."""
    pictures, labels, judged = imagenet(setting)
    few, case, right = {"inputs": pictures[judged][:8]}, ZOO["efficientnet_lite0"](1), {}
    for name, passes in forms(PICTURE_FORMS, setting.quick).items():
        built = compiled(case, name, passes, {"inputs": pictures[~judged]}, few, setting)
        right[name] = top_one(built, {"inputs": pictures[judged]}, labels[judged])
        if name != FLOAT:
            findings.top_one("efficientnet_lite0", {FLOAT: right[FLOAT], name: right[name]})
        if name == "int8":
            integer_layers(findings, "efficientnet_lite0", built, ("Conv",))
        if name.startswith("int4") and name != NEAREST:
            share(findings, name, right)


def integer_layers(findings: Findings, model: str, built: Artifact, kinds: tuple[str, ...]) -> None:
    """How many of a model's layers are computed in integers."""
    layers = [layer for layer in built.report["layers"] if layer["op"] in kinds]
    integer = sum(layer["dtype"] == "int8" for layer in layers)
    findings.summary |= {f"{model}_layers": len(layers), f"{model}_integer_layers": integer}
    findings.add(higher_is_better(f"{model} int8", f"integer {' and '.join(kinds)}", "kernels", integer, {"all": len(layers)}))


def share(findings: Findings, name: str, right: Mapping[str, np.ndarray]) -> None:
    """Of what rounding to nearest loses."""
    found = recovered(right[FLOAT], right[NEAREST], right[name])
    if found is not None:
        keys = [f"efficientnet_lite0_{name}_{key}" for key in ("recovered", "recovered_low", "recovered_high")]
        findings.summary |= dict(zip(keys, found, strict=True))
        findings.say(f"efficientnet_lite0 {name}: takes back {found[0]:.2f} ({found[1]:.2f} to {found[2]:.2f}) of the drop")


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
    """MiniLM: correlation of the embeddings' cosines with what people said, calibrated on other texts; distance from float."""
    encode, (lee, background), words = texts.encoder(), texts.lee50(), texts.wordsim353()
    case, judged = ZOO["minilm"](1), {"lee50": lee, "wordsim353": words}
    cosines: dict[str, dict[str, np.ndarray]] = {}
    for name, passes in forms(TEXTS, setting.quick).items():
        built = compiled(case, name, passes, encode(texts.calibration(background)), encode(lee.texts[:8]), setting)
        cosines[name] = {key: data.cosines(outputs(built, encode(data.texts))) for key, data in judged.items()}
        findings.summary[f"minilm_{name}_weight_bytes"] = built.report["result"]["weight_bytes"]
        for key, data in judged.items():
            before, after = cosines[FLOAT][key], cosines[name][key]
            correlated(findings, name, key, data.likeness, {FLOAT: before, name: after})
            if name in PAIRS:
                nearest = cosines[PAIRS[name]][key]
                correlated(findings, name, key, data.likeness, {PAIRS[name]: nearest, name: after})
                nearer(findings, name, key, (before, nearest, after))
        if name == "int8":
            integer_layers(findings, "minilm", built, ("MatMul", "Gemm"))


def correlated(findings: Findings, name: str, data: str, likeness: np.ndarray, sides: Mapping[str, np.ndarray]) -> None:
    """Correlation with what people said, and how much less than the first of the sides, with its interval."""
    (other, before), after = next(iter(sides.items())), sides[name]
    for measure, correlation in CORRELATIONS[data].items():
        first, second = (float(correlation(one, likeness).statistic) for one in (before, after))
        key, over = f"minilm_{name}_{data}_{measure}", "" if other == FLOAT else f"_from_{other}"
        findings.summary[key] = second
        if name == FLOAT:
            continue
        low, high = drop_interval(before, after, likeness, correlation)
        drop = {"drop": first - second, "drop_low": low, "drop_high": high}
        findings.summary |= {f"{key}{over}_{what}": value for what, value in drop.items()}
        findings.add(higher_is_better(f"minilm {name}", f"{data} {measure}", "1", second, {other: first}))
        findings.say(f"    drop {first - second:+.4f} ({low:+.4f} to {high:+.4f})")


def nearer(findings: Findings, name: str, data: str, cosines: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    """Root mean square distance of the pairs' cosines from the float model's: a method's beside that of rounding to nearest.

    People's judgements are few and noisy, and errors may agree with them by luck: this says what rounding did.
    """
    exact, nearest, found = cosines
    squares = np.stack([(nearest - exact) ** 2, (found - exact) ** 2])
    random = np.random.default_rng(0)
    rows = [random.integers(0, len(exact), len(exact)) for _ in range(RESAMPLES)]
    ratios = [float(np.sqrt(np.divide(*squares[:, one].mean(1)))) for one in rows]
    errors, (low, high) = np.sqrt(squares.mean(1)), np.percentile(ratios, (2.5, 97.5))
    key = f"minilm_{name}_{data}"
    findings.add(lower_is_better(f"minilm {name}", f"{data} rms error", "1", float(errors[1]), {PAIRS[name]: float(errors[0])}))
    ratio = {"times_nearer": float(errors[0] / errors[1]), "times_nearer_low": float(low), "times_nearer_high": float(high)}
    findings.summary |= {f"{key}_{what}": value for what, value in ratio.items()}


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
    """The demo model: joint plan and distillation, beside the same untrained and each family; and as `make demo` ships it."""
    recovered_demo(findings, setting)
    if not setting.quick:
        embedded(findings, setting)


def embedded(findings: Findings, setting: Setting) -> None:
    """The demo model, quantized only and as the whole plan makes it: on the embedded images, on the whole test set, and on
    that part of it by which nothing was chosen."""
    calibrate, evaluate = demo_data()
    labels = evaluate["labels"]
    case = Case("demo", ZOO["demo"](1).model, SHAPES, calibrate)
    built = {name: compiled(case, name, passes, calibrate, evaluate, setting) for name, passes in PLAIN.items()}
    run_demo(setting.scratch / "plan", threads=setting.threads)
    built["plan"] = Artifact(setting.scratch / "plan")
    images = {"image": evaluate["image"]}
    findings.top_one("demo_4000", {name: top_one(one, images, labels) for name, one in built.items()})
    pixels, labels = dataset(setting.fashion, "t10k")
    images = {"image": pixels[:, None].astype(np.float32) / 255}
    right = {name: top_one(one, images, labels) for name, one in built.items()}
    findings.top_one("demo_10000", right)
    unseen = slice(len(evaluate["image"]), None)  # the embedded images are the first ones, and the plan was chosen on them
    findings.top_one("demo_6000_unseen", {name: found[unseen] for name, found in right.items()})


PARTS: Mapping[str, Callable[[Findings, Setting], None]] = {
    "efficientnet_lite0": efficientnet, "minilm": minilm, "demo": demo,
    "palettes": trainings.palettes, "methods": trainings.methods,
}  # fmt: skip
