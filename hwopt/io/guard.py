"""Shape inference that may kill the process, tried out in a child first."""

from __future__ import annotations

import contextlib
import faulthandler
import os

import onnx

from hwopt.errors import ModelError
from hwopt.ir import Graph, of_op
from hwopt.ir.infer import skeleton


def check_inference(graph: Graph, place: str) -> None:
    """Raise ModelError if ONNX's shape inference would abort this process.

    It does on a Slice of a dimension that came out negative, or empty and read backwards (onnx 1.23: an assertion in
    std::clamp): a damaged model, or a size too small for the network's windows. Graphs without Slice are not tried.
    """
    if not any(of_op(graph, "Slice")) or not hasattr(os, "fork"):
        return
    model = skeleton(graph).SerializeToString()
    child = os.fork()
    if child == 0:
        _try(model)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        hint = "check the model's pads and windows, or give a larger --shape"
        raise ModelError("a value that is sliced has a negative or empty dimension", place=place, hint=hint)


def _try(model: bytes) -> None:
    """In the child: one call, no words, no core file, no clean-up of what belongs to the parent."""
    try:
        import resource  # as fork, not on every system

        faulthandler.disable()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        with contextlib.suppress(Exception):  # an ordinary error is the parent's to report
            onnx.shape_inference.infer_shapes(model, data_prop=True)
    finally:
        os._exit(0)
