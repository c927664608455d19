"""From torch to ONNX, through torch.export and torch.onnx."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx

from hwopt.errors import ModelError, UsageError
from hwopt.io.opset import PINNED


def to_onnx(model: Any, inputs: Any = None) -> onnx.ModelProto:
    """The ONNX model of a torch module with example inputs, of an ExportedProgram, or of a saved one (.pt2).

    Raises UsageError if torch is missing, example inputs are missing, or `model` is no model at all.
    """
    torch = _torch(model)
    if isinstance(model, (str, os.PathLike)):
        model = _loaded(torch, Path(model))
    if not isinstance(model, (torch.nn.Module, torch.export.ExportedProgram)):
        kinds = "the path of an ONNX file, a ModelProto, a torch module or an ExportedProgram"
        raise UsageError(f"{type(model).__name__} is no model", hint=f"give {kinds}")
    if isinstance(model, torch.nn.Module) and inputs is None:
        hint = "load(module, inputs=(torch.zeros(1, 3, 224, 224),))"
        raise UsageError(f"the torch module {type(model).__name__} needs example inputs", hint=hint)
    return _exported(torch, model, inputs)


def _torch(model: Any) -> Any:
    try:
        import onnxscript  # noqa: F401  torch.onnx needs it, and says so late
        import torch
    except ImportError as error:
        what = str(model) if isinstance(model, (str, os.PathLike)) else f"a {type(model).__name__}"
        raise UsageError(f"{what} needs torch: {error}", hint="pip install hwopt[torch]") from error
    return torch


def _loaded(torch: Any, path: Path) -> Any:
    try:
        return torch.export.load(path)
    except Exception as error:  # torch raises what its zip reader, its unpickler and its schema happen to raise
        raise ModelError(
            f"not a torch program: {_reason(error)}", place=str(path), hint="write it with torch.export.save"
        ) from error


def _exported(torch: Any, model: Any, inputs: Any) -> onnx.ModelProto:
    modes = {part: part.training for part in model.modules()} if isinstance(model, torch.nn.Module) else {}
    try:
        with warnings.catch_warnings(), torch.no_grad(), _quiet("torch.onnx"):
            warnings.simplefilter("ignore")
            program = torch.export.export(model.eval(), *_arguments(inputs)) if modes else model
            return torch.onnx.export(program, opset_version=PINNED, dynamo=True, verbose=False).model_proto
    except Exception as error:  # torch.export raises a kind of its own for every way to fail
        raise ModelError(f"torch cannot export the model: {_reason(error)}", place=type(model).__name__) from error
    finally:
        for part, mode in modes.items():
            part.training = mode


def _arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments from a tensor, a sequence or a mapping of them."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,), {}


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    """torch.onnx logs a warning for every optional package that is absent."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
