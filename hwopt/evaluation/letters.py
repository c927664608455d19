"""Character noise for texts: letters swapped, left out, doubled, or mistyped.

After Belinkov and Bisk, "Synthetic and Natural Noise Both Break Neural Machine Translation" (ICLR 2018). It is made on the
source text, which then goes through the tokenizer; noise on token numbers would mean nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

SHARES = (0.02, 0.05, 0.10, 0.15, 0.20)  # of the letters, by severity
ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")  # of a keyboard
BESIDE = {row[i]: row[max(i - 1, 0) : i] + row[i + 1 : i + 2] for row in ROWS for i in range(len(row))}


def misspelled(texts: Sequence[str], severity: int, seed: int) -> list[str]:
    """The texts with noise; the same seed gives the same."""
    random = np.random.default_rng([seed, 23, severity])
    return [_misspelled(text, SHARES[severity - 1], random) for text in texts]


def _misspelled(text: str, share: float, random: np.random.Generator) -> str:
    letters = list(text)
    places = [place for place, letter in enumerate(letters) if letter.isalpha() and random.random() < share]
    for place in places:
        kind, letter = int(random.integers(4)), letters[place]
        if kind == 0 and place + 1 < len(letters) and len(letters[place + 1]) == 1 and letters[place + 1].isalpha():
            letters[place], letters[place + 1] = letters[place + 1], letter
        elif kind == 1:
            letters[place] = ""
        elif kind == 2:
            letters[place] = letter * 2
        else:
            letters[place] = _mistyped(letter, random)
    return "".join(letters)


def _mistyped(letter: str, random: np.random.Generator) -> str:
    """The key beside it; another letter where the keyboard does not know it."""
    near = BESIDE.get(letter.lower()) or "etaoinshr"
    typed = near[int(random.integers(len(near)))]
    return typed.upper() if letter.isupper() else typed
