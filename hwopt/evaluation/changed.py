"""The samples that a compression changed most, saved for people to look at.

Where two models of one architecture disagree is where data are atypical, ambiguous or mislabelled: the "compression identified
exemplars" of Hooker et al. (arXiv:1911.05248).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hwopt.errors import DataError, UsageError
from hwopt.evaluation.outputs import Pair
from hwopt.evaluation.pixels import Pixels
from hwopt.samples import write_npz

KEEP = 16
PICTURE = re.compile(r"\d{2,}_sample\d+\.png")  # rank and sample


def changed_rows(pair: Pair, names: Sequence[str], keep: int) -> list[dict[str, Any]]:
    """The samples whose outputs are farthest apart, farthest first; those that are equal are left out."""
    each = pair.divergence
    order = [int(place) for place in np.argsort(-each, kind="stable")[:keep] if each[place] > 0]
    return [_row(place, float(each[place]), pair, names) for place in order]


def _row(place: int, divergence: float, pair: Pair, names: Sequence[str]) -> dict[str, Any]:
    row: dict[str, Any] = {"sample": place, "divergence": divergence}
    if pair.samples.labels is not None:
        row["label"] = _name(int(pair.samples.labels[place]), names)
    if pair.logits is not None:
        row |= {
            key: _name(int(side[place].argmax()), names) for key, side in zip(("float", "compressed"), pair.logits, strict=True)
        }
    if pair.samples.files is not None:
        row["file"] = str(pair.samples.files[place])
    if pair.samples.texts is not None:
        row["text"] = str(pair.samples.texts[place])
    return row


def _name(number: int, names: Sequence[str]) -> str:
    return names[number] if number < len(names) else str(number)


def save_changed(folder: Path, rows: list[dict[str, Any]], pair: Pair, pixels: Pixels | None) -> list[str]:
    """Write changed.npz (inputs, both models' first outputs) and, for pictures, one PNG each; the names of all files.

    `picture` is added to the rows. Pictures whose numbers are no brightnesses (`pixels` is None) are in the .npz alone. Those of
    an earlier evaluation go: the folder holds what this one found.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*_sample*.png"):
        if PICTURE.fullmatch(old.name):
            old.unlink()
    places = np.array([row["sample"] for row in rows], np.int64)
    arrays = {f"input_{name}": array[places] for name, array in pair.samples.arrays.items()}
    arrays |= {"sample": places, "float": pair.original[0][places], "compressed": pair.compressed[0][places]}
    if pair.samples.labels is not None:
        arrays["label"] = pair.samples.labels[places]
    arrays["divergence"] = np.array([row["divergence"] for row in rows])
    write_npz(folder / "changed.npz", arrays)
    if pixels is None:
        return ["changed.npz"]
    for rank, row in enumerate(rows):
        row["picture"] = f"{rank + 1:02d}_sample{row['sample']}.png"
        unit = pixels.unit(pair.samples.arrays[pixels.name][row["sample"]][None])[0]
        write_png(folder / row["picture"], np.rint(np.clip(unit, 0, 1) * 255).astype(np.uint8))
    return ["changed.npz", *(row["picture"] for row in rows)]


def write_png(path: Path, pixels: np.ndarray) -> None:
    """[height, width, 1 or 3] bytes; through Pillow, or matplotlib where that is what is there."""
    flat = pixels[..., 0] if pixels.shape[-1] == 1 else pixels
    try:
        from PIL import Image
    except ImportError:
        _write_with_matplotlib(path, flat)
        return
    Image.fromarray(flat).save(path)


def _write_with_matplotlib(path: Path, flat: np.ndarray) -> None:
    try:
        from matplotlib import image
    except ImportError as error:
        raise UsageError("saving pictures needs Pillow or matplotlib", hint="pip install 'hwopt[evaluate]'") from error
    image.imsave(path, flat, cmap="gray", vmin=0, vmax=255)


def check_folder(folder: Path | None) -> None:
    """Before long work: raise DataError unless the folder is new, or was written by an earlier evaluation."""
    if folder is None or not folder.exists():
        return
    if not folder.is_dir() or (any(folder.iterdir()) and not (folder / "changed.npz").exists()):
        raise DataError("holds something else", place=str(folder), hint="name a new folder")
