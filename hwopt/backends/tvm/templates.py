"""Calls of the kernel templates from Relax: one PrimFunc per distinct kernel, weights packed at compile time."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hwopt.analysis.narrow import pairs_that_fit
from hwopt.backends.tvm import kernels
from hwopt.backends.tvm.coded import CodedKernel
from hwopt.backends.tvm.kernels import packed
from hwopt.backends.tvm.kernels.packed import PackedSpec
from hwopt.backends.tvm.kernels.spec import ConvSpec, MatmulSpec, PoolSpec
from hwopt.backends.tvm.layout import OPAQUE, Expr, constant
from hwopt.backends.tvm.narrow import broadened
from hwopt.backends.tvm.transformed import transformed
from hwopt.backends.tvm.weighted import Kernel, Spec
from hwopt.target import MicroKernel, Target

Choose = Callable[[Any, MicroKernel, int], kernels.Schedule]  # the schedule of a kernel for a number of threads
PLAIN = {
    "float32": MicroKernel("float32", 4, 1, 16, "float32", "float32"),
    "int8": MicroKernel("int8", 4, 1, 16, "int32", "int8"),
}


class Templates:
    """The template kernels of one module."""

    def __init__(self, builder: Any, target: Target, threads: int, choose: Choose = kernels.default_schedule) -> None:
        self.builder, self.target, self.threads, self.choose = builder, target, threads, choose
        self.calls: Counter[tuple[Spec | PackedSpec | PoolSpec, MicroKernel]] = Counter()  # what tuning works on
        self.labels: dict[str, str] = {}  # variable -> region
        self._functions: dict[Spec | PackedSpec | PoolSpec, Any] = {}
        self.row_kernels: dict[Any, Any] = {}

    def call(self, kernel: Kernel, label: str) -> Expr | None:
        """The result of the kernel, a variable called `label`; None where no template takes its dtypes."""
        from tvm import relax

        kernel, micro = self.fitted(kernel)
        if kernels.supports(kernel.spec, micro):
            return None
        self.calls[kernel.spec, micro] += 1
        fixed = isinstance(kernel.weights, np.ndarray)
        weights = constant(kernels.pack(kernel.spec, kernel.weights, micro)) if fixed else kernel.weights
        arguments = relax.Tuple([kernel.data, weights, *kernel.tensors])
        result = relax.TensorType(list(kernel.shape), kernel.dtype)
        found = self.builder.emit(relax.call_tir(self._function(kernel.spec, micro), arguments, result), label)
        self.labels[found.name] = label  # Relax makes an identifier of it
        return found

    def fitted(self, kernel: Kernel) -> tuple[Kernel, MicroKernel]:
        """The kernel in the form that computes it fastest, and its micro-kernel."""
        kernel = self._narrowed(broadened(kernel, self.micro(kernel.spec).lanes))
        micro = self.micro(kernel.spec)
        return (transformed(kernel, micro) if self.target.spacious else kernel), micro

    def _narrowed(self, kernel: Kernel) -> Kernel:
        """With a note that its weights are small, where the target has a micro-kernel for those."""
        spec, weights = kernel.spec, kernel.weights
        if not isinstance(spec, ConvSpec | MatmulSpec) or not isinstance(weights, np.ndarray) or spec.weight_dtype != "int8":
            return kernel
        if not self.target.microkernels.get("int8", PLAIN["int8"]).narrow:
            return kernel
        layout = (spec.groups, spec.dilations[1]) if isinstance(spec, ConvSpec) else ()
        return dataclasses.replace(kernel, spec=dataclasses.replace(spec, narrow=pairs_that_fit(weights, *layout)))

    def call_coded(self, kernel: CodedKernel, label: str) -> Expr | None:
        """The same for a kernel that decodes its weights (kernels.packed); None where no micro-kernel reads such codes."""
        from tvm import relax

        micro = self._coded_micro(kernel.spec)
        if micro is None:
            return None
        self.calls[kernel.spec, micro] += 1
        weights = [constant(one) for one in packed.pack(kernel.spec, kernel.weights, micro)]
        arguments = relax.Tuple([kernel.data, *weights, *kernel.tensors])
        result = relax.TensorType(list(kernel.shape), kernel.dtype)
        found = self.builder.emit(relax.call_tir(self._function(kernel.spec, micro), arguments, result), label)
        self.labels[found.name] = label
        return found

    def call_pool(self, spec: PoolSpec, data: Expr, shape: Sequence[int], label: str) -> Expr:
        """The result of a pool, a variable called `label`."""
        from tvm import relax

        micro = self.target.microkernels.get("float32", PLAIN["float32"])
        self.calls[spec, micro] += 1
        result = relax.TensorType(list(shape), spec.out_dtype)
        found = self.builder.emit(relax.call_tir(self._function(spec, micro), relax.Tuple([data]), result), label)
        self.labels[found.name] = label
        return found

    def _coded_micro(self, spec: PackedSpec) -> MicroKernel | None:
        """The target's first micro-kernel that takes the codes, or plain multiplications."""
        first = self.target.microkernels.get(spec.weight_dtype, PLAIN[spec.weight_dtype])
        plain = dataclasses.replace(PLAIN[spec.weight_dtype], activation=spec.data_dtype, lanes=first.lanes)
        able = (one for one in (first, *first.others, plain) if one.rows == 1 and not packed.supports(spec, one))
        return next(able, None)

    def micro(self, spec: Spec) -> MicroKernel:
        """The target's first micro-kernel that takes the kernel, or plain multiplications where it has none."""
        if spec.accumulator == "float32" and "bfloat16" in (spec.data_dtype, spec.weight_dtype):
            return self._bfloat16(spec)
        family = "int8" if spec.accumulator == "int32" else "float32"
        found = self.target.microkernels.get(family, PLAIN[family])
        for micro in (found, *found.others):
            if micro.activation == spec.data_dtype and not kernels.supports(spec, micro):
                return micro
        plain = dataclasses.replace(PLAIN[family], activation=spec.data_dtype, dtype=spec.weight_dtype)
        last = (found, *found.others)[-1]
        return dataclasses.replace(plain, lanes=last.lanes, registers=last.registers)

    def suits(self, default: MatmulSpec, otherwise: MatmulSpec) -> bool:
        """True if the micro-kernel for `default` takes its operands as they lie in `otherwise`, too."""
        return not kernels.supports(otherwise, self.micro(default))

    def _bfloat16(self, spec: Spec) -> MicroKernel:
        """The target's dot products; float32 products of widened numbers without them, and where data alone are bfloat16."""
        wide = self.target.microkernels.get("float32", PLAIN["float32"])
        if spec.weight_dtype != "bfloat16":
            return wide
        found = self.target.microkernels.get("bfloat16")
        able = (one for one in ((found, *getattr(found, "others", ())) if found else ()) if not kernels.supports(spec, one))
        return next(able, dataclasses.replace(wide, dtype="bfloat16", activation="bfloat16"))

    def _function(self, spec: Spec | PackedSpec | PoolSpec, micro: MicroKernel) -> Any:
        """The module's function for this kernel, built once."""
        if spec not in self._functions:
            symbol = f"kernel_{len(self._functions)}"
            built = kernels.build(spec, self.choose(spec, micro, self.threads), micro, symbol)
            marked = built.with_attr({"hwopt.template": 1, **OPAQUE})
            self._functions[spec] = self.builder.add_func(marked, symbol)
        return self._functions[spec]
