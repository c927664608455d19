"""A source of samples as the command line writes it: a path and what else is to be known, `pictures,resize=256,rows=::4`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from hwopt.errors import DataError, UsageError, did_you_mean
from hwopt.named import is_named, named_function, takes_arguments
from hwopt.samples import Encode

FILTERS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")  # Pillow's
USE = "mine:encode, a function of a list of texts that returns arrays by input name"


@dataclass(frozen=True)
class Request:
    """Where samples lie and how to read them. Empty options mean what their file says.

    rows        start:stop:step of the samples to take
    labels      pictures: folders, names (0417.jpg, 0417_3.jpg), none, or a .csv file of name,label
    classes     a file with one class name in each line, in the order of the labels
    resize      pictures: their shorter side becomes so long, the centre is cut out; "exact" stretches them
    filter      pictures: how they are resampled
    split       datasets: which part, such as test
    image, label, text   datasets: the columns
    tokenizer   module:function that turns texts into the model's inputs
    """

    path: str
    rows: str = ""
    labels: str = ""
    classes: str = ""
    resize: str = ""
    filter: str = "bilinear"
    split: str = ""
    image: str = ""
    label: str = ""
    text: str = ""
    tokenizer: str = ""

    @property
    def file(self) -> Path:
        return Path(self.path)

    def sliced(self) -> slice:
        """`rows` as a slice of the samples."""
        try:
            start, stop, step = (*(int(part) if part else None for part in self.rows.split(":")), None, None)[:3]
        except ValueError as error:
            raise UsageError(f"cannot read rows={self.rows}", place=self.path, hint="write rows=0:100 or rows=1::2") from error
        return slice(start, stop, step) if self.rows else slice(None)

    def encode(self) -> Encode | None:
        """The tokenizer, if one is named."""
        return named_function(self.tokenizer, USE) if self.tokenizer else None


OPTIONS = tuple(one.name for one in fields(Request) if one.name != "path")


def parse_request(text: str) -> Request:
    """`path,option=value,...`; commas that no known option follows belong to the path. Raises UsageError."""
    path, *rest = text.split(",")
    options: dict[str, str] = {}
    for part in rest:
        name, equals, value = part.partition("=")
        if not equals and not options:
            path += f",{part}"
            continue
        if name not in OPTIONS or name in options:
            reason = f"{name} is given twice" if name in options else f"unknown option {name!r}"
            raise UsageError(reason, place=text, hint=did_you_mean(name, OPTIONS))
        options[name] = value
    if options.get("filter", "bilinear") not in FILTERS:
        raise UsageError(f"unknown filter {options['filter']!r}", place=text, hint=did_you_mean(options["filter"], FILTERS))
    found = Request(path, **options)
    found.sliced()
    return found


def is_scoring(data: object) -> bool:
    """True for the name of a function that scores a model (it takes `run`), false for data and for functions that give them."""
    if not is_named(data):
        return False
    use = "module:function; it scores if it takes run, it gives data if it takes nothing"
    return takes_arguments(named_function(str(data), use))


def class_names(path: Path) -> tuple[str, ...]:
    """The lines of a file, in the order of the labels."""
    try:
        return tuple(line.strip() for line in path.read_text().splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot be read: {error}", place=str(path), hint="one class name in each line") from error
