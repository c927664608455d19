"""Common corruptions of pictures: Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations" (ICLR 2019), with the strengths of their CIFAR-10-C, Tiny-ImageNet-C and ImageNet-C by the size of the picture.

With numpy, scipy and Pillow: the package `imagecorruptions` needs OpenCV and scikit-image, draws from a global generator, and
knows the strengths for large pictures only.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from io import BytesIO
from types import MappingProxyType

import numpy as np
from scipy import ndimage

from hwopt.errors import UsageError, did_you_mean
from hwopt.sources.pictures import pillow_image

SEVERITIES = (1, 2, 3, 4, 5)
Random = np.random.Generator
Change = Callable[[np.ndarray, float, Random], np.ndarray]


def _gaussian_noise(pictures: np.ndarray, deviation: float, random: Random) -> np.ndarray:
    return pictures + random.standard_normal(pictures.shape, np.float32) * np.float32(deviation)


def _shot_noise(pictures: np.ndarray, photons: float, random: Random) -> np.ndarray:
    return (random.poisson(pictures * photons) / photons).astype(np.float32)


def _impulse_noise(pictures: np.ndarray, share: float, random: Random) -> np.ndarray:
    """Salt and pepper, half each."""
    draw = random.random(pictures.shape, np.float32)
    return np.where(draw < share / 2, 0, np.where(draw < share, 1, pictures)).astype(np.float32)


def _blur(pictures: np.ndarray, deviation: float, _: Random) -> np.ndarray:
    return ndimage.gaussian_filter(pictures, (0, deviation, deviation, 0), mode="nearest")


def _contrast(pictures: np.ndarray, factor: float, _: Random) -> np.ndarray:
    means = pictures.mean((1, 2), keepdims=True)
    return (pictures - means) * np.float32(factor) + means


def _jpeg(pictures: np.ndarray, quality: float, _: Random) -> np.ndarray:
    return _through_pillow(pictures, lambda image: _compressed(image, int(quality)))


def _compressed(image, quality: int):  # type: ignore[no-untyped-def]  # Pillow's Image
    file = BytesIO()
    image.save(file, "JPEG", quality=quality)
    return pillow_image().open(file)


def _pixelate(pictures: np.ndarray, factor: float, _: Random) -> np.ndarray:
    box = pillow_image().Resampling.BOX

    def coarse(image):  # type: ignore[no-untyped-def]
        small = [max(int(side * factor), 1) for side in image.size]
        return image.resize(small, box).resize(image.size, box)

    return _through_pillow(pictures, coarse)


def _through_pillow(pictures: np.ndarray, change: Callable) -> np.ndarray:
    """Each picture as 8 bits through a function of Pillow images."""
    pillow, gray = pillow_image(), pictures.shape[-1] == 1
    bytes_ = np.rint(np.clip(pictures, 0, 1) * 255).astype(np.uint8)
    changed = [np.asarray(change(pillow.fromarray(one[..., 0] if gray else one))) for one in bytes_]
    return np.stack(changed).reshape(pictures.shape).astype(np.float32) / 255


# Strengths by severity, for pictures of up to 32, up to 64, and more pixels on a side.
_TABLE: Mapping[str, tuple[Change, tuple[tuple[float, ...], ...]]] = MappingProxyType({
    "gaussian-noise": (_gaussian_noise, ((.04, .06, .08, .09, .10), (.04, .08, .12, .15, .18), (.08, .12, .18, .26, .38))),
    "shot-noise": (_shot_noise, ((500, 250, 100, 75, 50), (250, 100, 50, 30, 15), (60, 25, 12, 5, 3))),
    "impulse-noise": (_impulse_noise, ((.01, .02, .03, .05, .07), (.01, .02, .05, .08, .14), (.03, .06, .09, .17, .27))),
    "blur": (_blur, ((.4, .6, .7, .8, 1), (.5, .75, 1, 1.25, 1.5), (1, 2, 3, 4, 6))),
    "contrast": (_contrast, ((.75, .5, .4, .3, .15), (.4, .3, .2, .1, .05), (.4, .3, .2, .1, .05))),
    "jpeg": (_jpeg, ((80, 65, 58, 50, 40), (65, 58, 50, 40, 25), (25, 18, 15, 10, 7))),
    "pixelate": (_pixelate, ((.95, .9, .85, .75, .65), (.9, .8, .7, .6, .5), (.6, .5, .4, .3, .25))),
})  # fmt: skip
SIZES = (32, 64)
CHARACTERS = "characters"
GROUPS: Mapping[str, tuple[str, ...]] = {"noise": ("gaussian-noise", "shot-noise"), "images": tuple(_TABLE)}
KNOWN = (*_TABLE, CHARACTERS)


def corrupted(pictures: np.ndarray, name: str, severity: int, seed: int) -> np.ndarray:
    """[samples, height, width, channels] from 0 to 1, float32; the same seed gives the same pictures."""
    change, strengths = _TABLE[name]
    size = max(pictures.shape[1:3])
    strength = strengths[sum(size > limit for limit in SIZES)][severity - 1]
    random = np.random.default_rng([seed, zlib.crc32(name.encode()), severity])
    return np.clip(change(pictures, strength, random), 0, 1).astype(np.float32)


def parse_corruptions(text: str) -> tuple[str, ...]:
    """Names by comma; `noise` and `images` stand for several. Raises UsageError for unknown ones."""
    found: list[str] = []
    for name in filter(None, (part.strip() for part in text.split(","))):
        if name not in KNOWN and name not in GROUPS:
            raise UsageError(f"unknown corruption {name!r}", place="--robustness", hint=did_you_mean(name, (*KNOWN, *GROUPS)))
        found += GROUPS.get(name, (name,))
    return tuple(dict.fromkeys(found))


def parse_severities(text: str) -> tuple[int, ...]:
    """`1-5` or `1,3,5`. Raises UsageError."""
    first, dash, last = text.partition("-")
    try:
        found = tuple(range(int(first), int(last) + 1)) if dash else tuple(map(int, text.split(",")))
    except ValueError as error:
        raise UsageError(f"cannot read {text!r}", place="--severities", hint="write 1-5 or 1,3,5") from error
    if not found or not set(found) <= set(SEVERITIES):
        raise UsageError(f"{text!r} is not within 1 to 5", place="--severities", hint="write 1-5 or 1,3,5")
    return found
