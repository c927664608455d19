"""Graph -> kernels for NVIDIA GPUs in CUDA C, as TVM's dlight schedules them, and how each is launched. Floats only.

Nothing of it needs a GPU or CUDA's runtime: TVM writes the source, nvcc compiles it (emit/cuda.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hwopt.backends.tvm import convert
from hwopt.backends.tvm.build import named
from hwopt.backends.tvm.fold import folded
from hwopt.backends.tvm.indices import take
from hwopt.backends.tvm.lower import Lowering
from hwopt.backends.tvm.read import Reading, read
from hwopt.backends.tvm.support import needs_runtime, refuse, refuse_unsupported, sorts_here
from hwopt.emit.cuda import CudaProgram, Launch
from hwopt.emit.program import Program
from hwopt.errors import HwoptError, UnsupportedError
from hwopt.ir import Graph, of_op
from hwopt.target import Target

LIMITS = {"max_threads_per_block": 1024, "max_shared_memory_per_block": 49152, "thread_warp_size": 32}
AXES = ("x", "y", "z")


class Plain(Lowering):
    """Every node as TVM's operator: the templates are for processors."""

    def region(self, region: Any) -> None:
        for node in region.nodes:
            if node.name not in self.constant:
                self.provide(node)
                self._put(node, convert.node_inputs(self.values, node), False)


def compile_cuda(graph: Graph, target: Target, name: str) -> CudaProgram:
    """The graph's kernels as CUDA C with their launches, in order; raises UnsupportedError that names what cannot be one."""
    refuse_unsupported(graph)
    graph = folded(graph)
    sorting = [(node, "sorts") for node in graph.nodes if sorts_here(graph, node)]
    refuse(graph, [*sorting, *needs_runtime(graph)], "compile it for a processor")
    integers = [node.name for node in (*of_op(graph, "QuantizeLinear"), *of_op(graph, "DequantizeLinear"))]
    if integers:
        hint = "leave out quantize: --passes prune-channels,low-rank"
        raise UnsupportedError("integer kernels for CUDA are not generated", place=f"node {integers[0]}", hint=hint)
    try:
        program, functions = named(_reading(graph, target), name)
        return _launched(program, functions, target)
    except HwoptError:
        raise
    except Exception as error:  # TVM's passes raise kinds of their own, without the node
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UnsupportedError(f"TVM cannot make CUDA of it: {reason}", place=graph.name) from error


def _tvm_target(target: Target) -> Any:
    import tvm

    host = {"kind": "llvm", "mtriple": target.tvm["host"]["mtriple"]}
    return tvm.target.Target({"kind": "cuda", "arch": target.tvm["arch"], **LIMITS}, host=host)


def _reading(graph: Graph, target: Target) -> Reading:
    import tvm
    from tvm import relax
    from tvm.s_tir import dlight

    passes, gpu = relax.transform, dlight.gpu
    fuse = [
        passes.LegalizeOps({"relax.take": take}),
        passes.AnnotateTIROpPattern(),
        passes.FoldConstant(),
        passes.FuseOps(),
        passes.FuseTIR(),
    ]
    rules = (gpu.Matmul(), gpu.GEMV(), gpu.Reduction(), gpu.GeneralReduction(), gpu.Transpose(), gpu.Fallback())
    with _tvm_target(target):
        module = tvm.transform.Sequential(fuse)(Plain(graph, target, 1).module())
        return read(passes.RewriteDataflowReshape()(dlight.ApplyDefaultSchedule(*rules)(module)), graph)


def _launched(program: Program, functions: Mapping[str, Any], target: Target) -> CudaProgram:
    """The functions after TVM has split them into what the host does, a launch each, and the kernels."""
    import tvm
    from tvm import tirx
    from tvm.tirx.build import codegen_build, split_host_device_mods

    description = _tvm_target(target)
    module = tvm.IRModule({symbol: function.with_attr("global_symbol", symbol) for symbol, function in functions.items()})
    with description:
        pipeline, _, finish = tirx.get_default_tir_pipeline(description)
        _, devices = split_host_device_mods(pipeline(tirx.transform.BindTarget(description)(module)))
        kinds = {kind: finish()(found) for kind, found in devices.items()}
        sources = [str(codegen_build(found, kind).inspect_source("cuda")) for kind, found in kinds.items()]
    kernels = {str(variable.name_hint): kernel for found in kinds.values() for variable, kernel in found.functions.items()}
    launches = []
    for call in program.calls:
        mine = [name for name in kernels if name.startswith(f"{call.symbol}_kernel")]
        if len(mine) != 1:
            raise UnsupportedError(f"{call.label} becomes {len(mine)} kernels", place=program.name)
        launches.append(_launch(mine[0], kernels[mine[0]], functions[call.symbol], call.args, call.label))
    return CudaProgram(program, tuple(launches), "\n".join(sources), str(target.tvm["arch"]), str(target.tvm["host"]["mtriple"]))


def _launch(name: str, kernel: Any, function: Any, arguments: tuple[str, ...], label: str) -> Launch:
    """How a kernel is launched; its parameters are the function's, by name, in an order of their own."""
    extents = _extents(kernel.body)
    grid, block = (tuple(extents.get(f"{kind}.{axis}", 1) for axis in AXES) for kind in ("blockIdx", "threadIdx"))
    names = [str(parameter.name) for parameter in function.params]
    given = dict(zip(names, arguments, strict=True))
    wanted = [str(parameter.name).removesuffix("_ptr") for parameter in kernel.params]
    unknown = [one for one in wanted if names.count(one) != 1]
    parameters = [str(one) for one in kernel.attrs["tirx.kernel_launch_params"]]
    if unknown or any("." not in one or one.split(".")[0] not in ("blockIdx", "threadIdx") for one in parameters):
        raise UnsupportedError(f"{label} asks its launch for {', '.join(unknown or parameters)}", place=name)
    return Launch(name, grid, block, tuple(given[one] for one in wanted), label)


def _extents(body: Any) -> dict[str, int]:
    """blockIdx.x ... threadIdx.z -> how many."""
    import tvm_ffi
    from tvm import tirx

    found: list[Any] = []
    tvm_ffi.structural_walk(body, [(tirx.AttrStmt, found.append)])
    return {str(one.node.thread_tag): int(one.value) for one in found if one.attr_key == "thread_extent"}
