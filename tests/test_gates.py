"""Gates in front of a quantization: polynomials where the rounding hides their error, the exact functions elsewhere."""

from __future__ import annotations

import math

import numpy as np
import pytest
import tvm
from onnx import parser

from hwopt.analysis.gates import self_gated
from hwopt.backends.tvm import kernels
from hwopt.backends.tvm.build import tvm_target
from hwopt.backends.tvm.kernels.epilogue import LOST, Epilogue
from hwopt.backends.tvm.kernels.functions import QUICK
from hwopt.backends.tvm.kernels.spec import Activation, MatmulSpec, Quantize
from hwopt.io.proto import from_model
from hwopt.plugins import find_target

EXACT = {
    "gelu": lambda x: x / 2 * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
    "gelu_tanh": lambda x: x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "silu": lambda x: x / (1 + np.exp(-x)),
}
SCALE, ZERO_POINT = 0.1, 9
INPUTS = np.linspace(-12, 12, 4096, dtype=np.float32)


def steps(gate: str, scale: float = SCALE) -> tuple[Activation, Quantize]:
    return Activation(gate), Quantize(scale, ZERO_POINT, "uint8")


@pytest.mark.parametrize("gate", QUICK)
def test_quantized_gates_are_right_but_for_a_few_roundings(gate: str) -> None:
    target = find_target("host")
    spec = MatmulSpec(1, INPUTS.size, 16, 1, out_dtype="uint8", epilogue=steps(gate))
    micro = target.microkernels["float32"]
    function = kernels.build(spec, kernels.default_schedule(spec, micro), micro, "kernel")
    library = tvm.tirx.build(tvm.IRModule({"kernel": function}), target=tvm_target(target))
    weights = tvm.runtime.tensor(kernels.pack(spec, np.ones((1, 16), np.float32), micro))
    out = tvm.runtime.tensor(np.zeros(INPUTS.size * 16, np.uint8))
    library["kernel"](tvm.runtime.tensor(INPUTS), weights, out)
    wanted = np.clip(np.rint(EXACT[gate](INPUTS.astype(float)) / SCALE) + ZERO_POINT, 0, 255)
    difference = np.abs(out.numpy().reshape(-1, 16)[:, 0].astype(float) - wanted)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.01


@pytest.mark.parametrize("gate", QUICK)
def test_fine_quantization_gets_the_exact_function(gate: str) -> None:
    def used(scale: float) -> str:
        return Epilogue(steps(gate, scale), "float32", "uint8", 16, 1, 16, True).steps[0].function

    assert used(QUICK[gate].error / LOST * 1.1) == f"quick_{gate}"
    assert used(QUICK[gate].error / LOST * 0.9) == gate


@pytest.mark.parametrize("gate", QUICK)
def test_the_polynomials_are_as_good_as_they_say(gate: str) -> None:
    quick = QUICK[gate]
    x = np.linspace(-20, 20, 100_001)
    inner = x.clip(-quick.limit, quick.limit)
    found = x * (inner * np.polyval(quick.coefficients, inner**2) + 0.5)
    assert np.abs(found - EXACT[gate](x))[np.abs(x) < 12].max() <= quick.error


def test_a_factor_with_axes_of_its_own_is_no_gate_of_a_kernel() -> None:
    text = """<ir_version: 10, opset_import: ["" : 21]> agraph (float[1,2,3,4] x) => (float[1,1,2,3,4] y)
    <float[1,1,1,1,1] a = {1.7}> { h = Relu(x) m = Mul(h, a) s = Sigmoid(m) y = Mul(h, s) }"""
    assert self_gated(from_model(parser.parse_model(text)), "h") == ()
    assert self_gated(from_model(parser.parse_model(text.replace("[1,1,1,1,1]", "[1]").replace("[1,1,2", "[1,2"))), "h")
