"""Folders of pictures: one folder for each class, as torchvision's ImageFolder, or all in one with labels beside them."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from hwopt.errors import DataError, UsageError
from hwopt.io.preprocess import channel_axis, preprocess_of
from hwopt.ir import Graph, numpy_dtype
from hwopt.samples import Samples
from hwopt.sources.request import Request, class_names

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".gif")
PIXELS = "give --preprocess mean=..,std=..,scale=1/255, so that the model takes pixels"


def is_picture_folder(path: Path) -> bool:
    """A folder with pictures in it, or in the folders in it."""
    return path.is_dir() and next(_pictures(path), None) is not None


def _pictures(folder: Path) -> Any:
    return (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())


def read_pictures(request: Request, graph: Graph) -> Samples:
    """Every picture of a folder as pixels of the model's only picture input, in the order of their names.

    The label is the class's place among the sorted folders, as in torchvision; where all of them are numbers (0000, 0002 ...),
    the number itself; with `classes`, the line that names the folder.
    """
    folder = request.file
    files = sorted(_pictures(folder), key=lambda path: path.relative_to(folder).as_posix())
    labels, names = _labels(files, request)
    name = picture_input(graph, str(folder))
    shape = graph.tensor(name).dims[1:]
    pixels = np.empty((len(files), *shape), numpy_dtype(graph.tensor(name).dtype))
    for place, file in enumerate(files):
        pixels[place] = picture(file, graph, name, request.resize, request.filter)
    listed = np.array([file.relative_to(folder).as_posix() for file in files])
    return Samples(MappingProxyType({name: pixels}), labels, str(folder), names, files=listed)


def picture_input(graph: Graph, place: str) -> str:
    """The only input, which takes pixels. Raises DataError where pictures as they are would mean nothing to the model."""
    found = [name for name in graph.inputs if channel_axis(graph.tensor(name)) is not None]
    if len(graph.inputs) != 1 or not found:
        kinds = ", ".join(f"{name}: {graph.tensor(name)}" for name in graph.inputs)
        raise DataError(f"pictures are the only input of no model that takes {kinds}", place=place, hint="give an .npz")
    kind = graph.tensor(found[0])
    if kind.dtype != "uint8" and preprocess_of(graph) is None:
        raise DataError(f"pictures hold bytes, the model takes {kind}", place=place, hint=PIXELS)
    return found[0]


def picture(file: Path | bytes, graph: Graph, name: str, resize: str, resampling: str) -> np.ndarray:
    """One picture, [height, width, channels] or [channels, height, width] as the input has it, in its element type."""
    kind = graph.tensor(name)
    axis = channel_axis(kind) or 1
    sizes = [size for place, size in enumerate(kind.dims) if place not in (0, axis)]
    image = _opened(file, {1: "L", 3: "RGB", 4: "RGBA"}[kind.dims[axis]])
    image = _fitted(image, (sizes[1], sizes[0]), resize, resampling, str(file) if isinstance(file, Path) else "a picture")
    array = np.asarray(image)
    array = array[..., None] if array.ndim == 2 else array
    return (array.transpose(2, 0, 1) if axis == 1 else array).astype(numpy_dtype(kind.dtype))


def _opened(file: Path | bytes, mode: str) -> Any:
    pillow = pillow_image()
    try:
        with pillow.open(file if isinstance(file, Path) else BytesIO(file)) as image:
            return image.convert(mode)
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(
            f"is no readable picture ({error})", place=str(file) if isinstance(file, Path) else "a picture"
        ) from error


def pillow_image() -> Any:
    """Pillow's Image module; raises UsageError with the way to get it."""
    try:
        from PIL import Image
    except ImportError as error:
        raise UsageError("pictures need Pillow", hint="pip install 'hwopt[evaluate]'") from error
    return Image


def _fitted(image: Any, size: tuple[int, int], resize: str, resampling: str, place: str) -> Any:
    """The picture at (width, height): as it is, stretched, or its shorter side made `resize` long and the centre cut out."""
    method = getattr(pillow_image().Resampling, resampling.upper())
    if resize == "exact":
        return image if image.size == size else image.resize(size, method)
    if resize:
        if not resize.isdecimal():
            raise UsageError(f"resize={resize}", hint="write resize=256 (the shorter side) or resize=exact")
        longer = [round(side * int(resize) / min(image.size)) for side in image.size]
        image = image if min(image.size) == int(resize) else image.resize(longer, method)
        left, top = (round((have - want) / 2) for have, want in zip(image.size, size, strict=True))
        if min(left, top) < 0:
            raise UsageError(f"resize={resize} is smaller than the {size[0]} x {size[1]} that the model takes", place=place)
        return image.crop((left, top, left + size[0], top + size[1]))
    if image.size != size:
        hint = "add ,resize=256 to the folder (the shorter side, then the centre), or ,resize=exact"
        reason = f"is {image.size[0]} x {image.size[1]}, the model takes {size[0]} x {size[1]}"
        raise DataError(reason, place=place, hint=hint)
    return image


def _labels(files: Sequence[Path], request: Request) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """Labels of the files, and names of the classes; without either where nothing says what they are."""
    folders = {file.relative_to(request.file).parts[0] for file in files if file.parent != request.file}
    way = request.labels or ("folders" if folders else "none")
    if way == "none":
        return None, ()
    if way == "names":
        return np.array([_number_of(file) for file in files]), ()
    if way.endswith(".csv"):
        listed = _Listed(Path(way))
        return np.array([listed.label(file.relative_to(request.file).as_posix()) for file in files]), ()
    if way != "folders":
        hint = "write labels=folders, names, none or FILE.csv"
        raise UsageError(f"labels={way}", place=str(request.file), hint=hint)
    stray = [file for file in files if file.parent == request.file]
    if stray:
        raise DataError(f"lies beside the folders of the classes: {stray[0].name}", place=str(request.file))
    return _of_folders(files, request, sorted(folders))


def _of_folders(files: Sequence[Path], request: Request, folders: Sequence[str]) -> tuple[np.ndarray, tuple[str, ...]]:
    known = class_names(Path(request.classes)) if request.classes else ()
    numbered = not known and all(name.isdecimal() for name in folders)
    places = {name: int(name) if numbered else place for place, name in enumerate(known or folders)}
    missing = [name for name in folders if name not in places]
    if missing:
        raise DataError(f"{request.classes} does not name {missing[0]}", place=str(request.file))
    labels = np.array([places[file.relative_to(request.file).parts[0]] for file in files])
    return labels, () if numbered else tuple(known or folders)


def _number_of(file: Path) -> int:
    """0417.jpg and 0417_3.jpg are of class 417."""
    head = file.stem.partition("_")[0]
    if not head.isdecimal():
        hint = "leave out labels=names"
        raise DataError(f"{file.name} does not begin with the number of its class", place=str(file.parent), hint=hint)
    return int(head)


class _Listed:
    """The labels that a .csv file of name,label states."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open(newline="") as file:
                self.rows = {row[0].strip(): row[1].strip() for row in csv.reader(file) if len(row) > 1}
        except OSError as error:
            raise DataError(f"cannot be read: {error.strerror}", place=str(path)) from error

    def label(self, name: str) -> int:
        text = self.rows.get(name, "")
        if not text.isdecimal():
            hint = "one line name,label for each picture"
            raise DataError(f"states no class index for {name}", place=str(self.path), hint=hint)
        return int(text)
