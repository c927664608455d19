"""Activation-aware scaling: weights of strong inputs are made larger before they are rounded, and so lose less.

Lin et al., "AWQ: activation-aware weight quantization for on-device LLM compression and acceleration", MLSys 2024.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np

from hwopt.ir import Graph, Node
from passes._channel_scales import Rescaling, matrix, move, readers_of

STRENGTHS = tuple(step / 10 for step in range(11))  # exponents of the mean magnitude; 0: as it was
GAIN = 0.95  # of the error: less is not worth a change
Rounded = Callable[[np.ndarray, np.ndarray], np.ndarray]  # weights [k, n], mean squares [k] -> rounded weights


def scaled(graph: Graph, nodes: Iterable[Node], seconds: Mapping[str, np.ndarray], rounded: Rounded, by: str) -> Graph:
    """x W -> (x / s) (diag(s) W), with the s = rms(x)^a whose rounded weights disturb the outputs least, by moments of x."""
    scales = Rescaling(graph)
    for value, readers in readers_of(nodes).items():
        factors = best_factors(np.concatenate([matrix(graph, node) for node in readers], 1), seconds[readers[0].name], rounded)
        if factors is not None:
            move(scales, value, readers, factors)
    edit = graph.edit()
    scales.write(edit)
    return edit.finish(by)


def best_factors(weights: np.ndarray, moment: np.ndarray, rounded: Rounded) -> np.ndarray | None:
    """s [k] for weights [k, n] under inputs with the second moment [k, k]; None if nothing is gained."""
    strong = np.sqrt(np.maximum(np.diag(moment), 0))
    strong = np.maximum(strong, 1e-4 * max(strong.max(initial=0.0), 1e-30))
    errors, tried = [], []
    for strength in STRENGTHS:
        factors = strong**strength
        factors = factors / np.sqrt(factors.max() * factors.min())
        found = rounded(weights * factors[:, None], np.diag(moment) / factors**2) / factors[:, None]
        errors.append(float(np.sum((found - weights) * (moment @ (found - weights)))))
        tried.append(factors)
    least = int(np.argmin(errors))
    return tried[least] if errors[least] < GAIN * errors[0] else None
