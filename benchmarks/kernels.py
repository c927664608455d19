"""Template kernels against ONNX Runtime, one layer at a time, interleaved in one process on one thread.

Run: TVM_NUM_THREADS=1 python -m benchmarks.kernels
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import tvm
from onnx import helper, numpy_helper

from hwopt.backends.tvm import kernels
from hwopt.backends.tvm.kernels.spec import Activation, Bias, ConvSpec, Quantize, Scale
from targets import _isa_x86

LAYERS = (  # size, channels, out, kernel, stride, groups
    (224, 3, 32, 3, 2, 1),
    (56, 64, 64, 3, 1, 1),
    (28, 128, 128, 3, 1, 1),
    (14, 256, 256, 3, 1, 1),
    (7, 512, 512, 3, 1, 1),
    (56, 24, 144, 1, 1, 1),
    (7, 960, 320, 1, 1, 1),
    (112, 32, 32, 3, 1, 32),
    (14, 480, 480, 5, 1, 480),
)


def specification(layer: tuple[int, ...], integer: bool) -> ConvSpec:
    """The layer with bias and relu, or with bias and requantization."""
    size, channels, out, kernel, stride, groups = layer
    shape = (1, size, size, channels, out, (kernel, kernel), (stride, stride), (1, 1), (kernel // 2,) * 4, groups)
    if integer:
        return ConvSpec(*shape, "uint8", "int8", "uint8", 3, (Bias(), Scale(), Quantize(0.05, 0, "uint8")))
    return ConvSpec(*shape, epilogue=(Bias(), Activation("relu")))


def ours(spec: ConvSpec, weights: np.ndarray, flags: set[str]) -> Callable[[], Any]:
    """The kernel with the default schedule, ready to be called."""
    micro = _isa_x86.microkernels(flags)["int8" if spec.weight_dtype == "int8" else "float32"]
    function = kernels.build(spec, kernels.default_schedule(spec, micro), micro, "kernel")
    with tvm.transform.PassContext(config={"tirx.disable_assert": True}):
        library = tvm.tirx.build(tvm.IRModule({"kernel": function}), tvm.target.Target(_isa_x86.llvm(flags)))
    data = np.random.default_rng(0).integers(0, 100, spec.height * spec.width * spec.in_channels).astype(spec.data_dtype)
    arrays = [data, kernels.pack(spec, weights, micro), np.zeros(spec.out_channels, spec.accumulator)]
    if spec.weight_dtype == "int8":
        arrays.append(np.full(spec.out_channels, 1e-4, np.float32))
    arrays.append(np.zeros(spec.out_height * spec.out_width * spec.out_channels, spec.out_dtype))
    arguments = [tvm.runtime.tensor(array) for array in arrays]
    kernel = library["kernel"]
    return lambda: kernel(*arguments)


def theirs(spec: ConvSpec, weights: np.ndarray) -> Callable[[], Any]:
    """The same layer in ONNX Runtime."""
    attributes = {"kernel_shape": spec.kernel, "pads": spec.pads, "strides": spec.strides, "group": spec.groups}
    bias = np.zeros(spec.out_channels, spec.accumulator)
    constants = {"w": weights, "b": bias}
    if spec.weight_dtype == "int8":
        constants |= {"xs": np.float32(0.02), "xz": np.uint8(3), "ys": np.float32(0.05), "yz": np.uint8(0)}
        constants |= {"ws": np.full(spec.out_channels, 0.01, np.float32), "wz": np.zeros(spec.out_channels, np.int8)}
        nodes = [helper.make_node("QLinearConv", ["x", "xs", "xz", "w", "ws", "wz", "ys", "yz", "b"], ["y"], **attributes)]
    else:
        nodes = [helper.make_node("Conv", ["x", "w", "b"], ["c"], **attributes), helper.make_node("Relu", ["c"], ["y"])]
    kind = onnx.TensorProto.UINT8 if spec.weight_dtype == "int8" else onnx.TensorProto.FLOAT
    shape = [1, spec.in_channels, spec.height, spec.width]
    inputs, outputs = helper.make_tensor_value_info("x", kind, shape), helper.make_tensor_value_info("y", kind, None)
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "layer", [inputs], [outputs], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    data = np.random.default_rng(0).integers(0, 100, shape).astype(spec.data_dtype)
    return lambda: session.run(None, {"x": data})


def compare(first: Callable[[], Any], second: Callable[[], Any], rounds: int = 30) -> tuple[float, float]:
    """Median seconds of both, taken in turns."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for found, call in zip(times, (first, second), strict=True):
            start = time.perf_counter()
            call()
            found.append(time.perf_counter() - start)
    return statistics.median(times[0]), statistics.median(times[1])


def main() -> None:
    """Prints one line per layer and precision; a ratio above 1 means that hwopt is faster."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = set(next(line for line in lines if line.startswith("flags")).split(":")[1].split())
    for integer in (False, True):
        for layer in LAYERS:
            spec = specification(layer, integer)
            shape = (spec.out_channels, spec.in_channels // spec.groups, *spec.kernel)
            weights = np.random.default_rng(1).integers(-100, 100, shape).astype(spec.weight_dtype)
            mine, peer = compare(ours(spec, weights, flags), theirs(spec, weights))
            rate = 2 * spec.macs / mine / 1e9
            name = f"{spec.height}x{spec.width}x{spec.in_channels}->{spec.out_channels} k{spec.kernel[0]} s{spec.strides[0]}"
            head = f"{spec.weight_dtype:8}{name:28}{mine * 1e6:9.1f} us{rate:8.0f} Gop/s"
            print(f"{head}   ONNX Runtime{peer * 1e6:9.1f} us   {peer / mine:.2f}x")


if __name__ == "__main__":
    main()
