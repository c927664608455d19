"""From torch to ONNX, through torch.export and torch.onnx."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx

from hwopt.errors import ModelError, UsageError
from hwopt.io.opset import PINNED


def to_onnx(model: Any, inputs: Sequence[Any] | None = None) -> onnx.ModelProto:
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
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"not a torch program: {reason}", place=str(path), hint="write it with torch.export.save") from error


def _exported(torch: Any, model: Any, inputs: Sequence[Any] | None) -> onnx.ModelProto:
    is_module = isinstance(model, torch.nn.Module)
    training = is_module and model.training
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            if is_module:
                model = torch.export.export(model.eval(), tuple(inputs or ()))
            program = torch.onnx.export(model, opset_version=PINNED, dynamo=True, verbose=False, optimize=True)
        return program.model_proto
    except Exception as error:  # torch.export raises a kind of its own for every way to fail
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"torch cannot export the model: {reason}", place=type(model).__name__) from error
    finally:
        if training:
            model.train()
