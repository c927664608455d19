"""Runs inside of Vela's own environment: layers as JSON lines on stdin, cycles on stdout. Needs nothing of hwopt.

Every layer becomes a TensorFlow Lite file of one int8 operator with random weights, which Vela compiles and estimates.
"""

from __future__ import annotations

import csv
import json
import math
import random
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import flatbuffers
from ethosu.vela.tflite import (
    Buffer,
    Conv2DOptions,
    DepthwiseConv2DOptions,
    FullyConnectedOptions,
    Model,
    Operator,
    OperatorCode,
    QuantizationParameters,
    SubGraph,
    Tensor,
)
from ethosu.vela.tflite.BuiltinOperator import BuiltinOperator
from ethosu.vela.tflite.BuiltinOptions import BuiltinOptions
from ethosu.vela.tflite.Padding import Padding
from ethosu.vela.tflite.TensorType import TensorType

KINDS = {
    "conv": (BuiltinOperator.CONV_2D, BuiltinOptions.Conv2DOptions),
    "depthwise": (BuiltinOperator.DEPTHWISE_CONV_2D, BuiltinOptions.DepthwiseConv2DOptions),
    "matmul": (BuiltinOperator.FULLY_CONNECTED, BuiltinOptions.FullyConnectedOptions),
}


def numbers(builder: flatbuffers.Builder, values: list[int], width: int = 4) -> int:
    builder.StartVector(width, len(values), width)
    for value in reversed(values):
        builder.PrependInt32(value) if width == 4 else builder.PrependInt64(value)
    return builder.EndVector()


def offsets(builder: flatbuffers.Builder, values: list[int]) -> int:
    builder.StartVector(4, len(values), 4)
    for value in reversed(values):
        builder.PrependUOffsetTRelative(value)
    return builder.EndVector()


def tensor(builder: flatbuffers.Builder, name: str, shape: list[int], kind: int, buffer: int, scale: float) -> int:
    builder.StartVector(4, 1, 4)
    builder.PrependFloat32(scale)
    scales, zeros = builder.EndVector(), numbers(builder, [0], 8)
    QuantizationParameters.QuantizationParametersStart(builder)
    QuantizationParameters.QuantizationParametersAddScale(builder, scales)
    QuantizationParameters.QuantizationParametersAddZeroPoint(builder, zeros)
    quantization = QuantizationParameters.QuantizationParametersEnd(builder)
    label, dims = builder.CreateString(name), numbers(builder, shape)
    Tensor.TensorStart(builder)
    Tensor.TensorAddShape(builder, dims)
    Tensor.TensorAddType(builder, kind)
    Tensor.TensorAddBuffer(builder, buffer)
    Tensor.TensorAddName(builder, label)
    Tensor.TensorAddQuantization(builder, quantization)
    return Tensor.TensorEnd(builder)


def options(builder: flatbuffers.Builder, job: dict[str, Any]) -> int:
    if job["kind"] == "matmul":
        FullyConnectedOptions.FullyConnectedOptionsStart(builder)
        return FullyConnectedOptions.FullyConnectedOptionsEnd(builder)
    module = Conv2DOptions if job["kind"] == "conv" else DepthwiseConv2DOptions
    name = module.__name__.rpartition(".")[2]
    getattr(module, f"{name}Start")(builder)
    for key, value in (("Padding", Padding.SAME), ("StrideW", job["stride"]), ("StrideH", job["stride"])):
        getattr(module, f"{name}Add{key}")(builder, value)
    if job["kind"] == "depthwise":
        DepthwiseConv2DOptions.DepthwiseConv2DOptionsAddDepthMultiplier(builder, 1)
    return getattr(module, f"{name}End")(builder)


def model(job: dict[str, Any]) -> bytes:
    """One operator between an input and an output."""
    builder = flatbuffers.Builder(1 << 20)
    random.seed(0)
    inputs, outputs, kernel = job["inputs"], job["outputs"], job["kernel"]
    dense = job["kind"] == "matmul"
    conv = [1, kernel, kernel, outputs] if job["kind"] == "depthwise" else [outputs, kernel, kernel, inputs]
    weight = [outputs, inputs] if dense else conv
    count = math.prod(weight)
    contents = [b"", random.randbytes(count), b"\0\0\0\0" * outputs]
    buffers = []
    for content in contents:
        data = builder.CreateByteVector(content) if content else 0
        Buffer.BufferStart(builder)
        if content:
            Buffer.BufferAddData(builder, data)
        buffers.append(Buffer.BufferEnd(builder))
    image, result = [1, job["height"], job["height"], inputs], [1, job["rows"], job["rows"], outputs]
    ends = ([1, inputs], [1, outputs]) if dense else (image, result)
    tensors = [
        tensor(builder, "x", ends[0], TensorType.INT8, 0, 0.05),
        tensor(builder, "w", weight, TensorType.INT8, 1, 0.01),
        tensor(builder, "b", [outputs], TensorType.INT32, 2, 0.0005),
        tensor(builder, "y", ends[1], TensorType.INT8, 0, 0.1),
    ]
    code, kind = KINDS[job["kind"]]
    chosen = options(builder, job)
    reads, writes = numbers(builder, [0, 1, 2]), numbers(builder, [3])
    Operator.OperatorStart(builder)
    Operator.OperatorAddOpcodeIndex(builder, 0)
    Operator.OperatorAddInputs(builder, reads)
    Operator.OperatorAddOutputs(builder, writes)
    Operator.OperatorAddBuiltinOptionsType(builder, kind)
    Operator.OperatorAddBuiltinOptions(builder, chosen)
    operators = offsets(builder, [Operator.OperatorEnd(builder)])
    listed, first, last = offsets(builder, tensors), numbers(builder, [0]), numbers(builder, [3])
    SubGraph.SubGraphStart(builder)
    SubGraph.SubGraphAddTensors(builder, listed)
    SubGraph.SubGraphAddInputs(builder, first)
    SubGraph.SubGraphAddOutputs(builder, last)
    SubGraph.SubGraphAddOperators(builder, operators)
    graphs = offsets(builder, [SubGraph.SubGraphEnd(builder)])
    OperatorCode.OperatorCodeStart(builder)
    OperatorCode.OperatorCodeAddDeprecatedBuiltinCode(builder, code)
    OperatorCode.OperatorCodeAddVersion(builder, 3 if job["kind"] != "matmul" else 4)
    OperatorCode.OperatorCodeAddBuiltinCode(builder, code)
    codes, all_buffers = offsets(builder, [OperatorCode.OperatorCodeEnd(builder)]), offsets(builder, buffers)
    Model.ModelStart(builder)
    Model.ModelAddVersion(builder, 3)
    Model.ModelAddOperatorCodes(builder, codes)
    Model.ModelAddSubgraphs(builder, graphs)
    Model.ModelAddBuffers(builder, all_buffers)
    builder.Finish(Model.ModelEnd(builder), b"TFL3")
    return bytes(builder.Output())


def estimated(job: dict[str, Any]) -> dict[str, Any]:
    """Vela's cycles for a layer, all of which must run on the NPU."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "layer.tflite"
        file.write_bytes(model(job))
        named = {"accelerator-config": "accelerator", "system-config": "system", "memory-mode": "memory"}
        chosen = [part for option, name in named.items() for part in (f"--{option}", job[name])]
        vela = str(Path(sys.executable).with_name("vela"))
        command = [vela, str(file), "--output-dir", folder, "--config", "Arm/vela.ini", *chosen]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found = list(Path(folder).glob("*summary*.csv"))
        if done.returncode or not found:
            return {"key": job["key"], "error": (done.stdout + done.stderr)[-400:]}
        with found[0].open() as rows:
            row = next(csv.DictReader(rows))
    cycles = {"cycles": float(row["cycles_total"]), "npu": float(row["cycles_npu"])}
    return {"key": job["key"], "version": version("ethos-u-vela"), **cycles}


for line in sys.stdin:
    print(json.dumps(estimated(json.loads(line))), flush=True)
