"""A convolution and the global pool behind it as one kernel, where nothing else reads what lies between."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from hwopt.analysis.qdq import dequantized, quantization
from hwopt.analysis.regions import Region, reduces_image, regions
from hwopt.backends.tvm.kernels.spec import ConvSpec, Mean, Quantize
from hwopt.backends.tvm.weighted import Kernel
from hwopt.ir import Graph, Node


def pools(graph: Graph) -> Mapping[str, Region]:
    """The anchors of convolutions whose results are only averaged over the image, with the regions that do it."""
    convolutions = {region.output: region for region in regions(graph) if region.anchor.op == "Conv" and not region.bfloat16}
    found = {}
    for region in regions(graph):
        source = convolutions.get(_source(graph, region)) if _averages(graph, region) else None
        if source is not None:
            found[source.anchor.name] = region
    return found


def _averages(graph: Graph, region: Region) -> bool:
    node = region.anchor
    image = node.op == "GlobalAveragePool" or (node.op == "ReduceMean" and reduces_image(graph, node))
    return image and not region.bfloat16 and [one.op for one in region.epilogue] in ([], ["QuantizeLinear"])


def _source(graph: Graph, region: Region) -> str:
    """The value that a pool alone reads, dequantized between them where it computes on integers; "" if others do."""
    value = region.anchor.inputs[0]
    if not _alone(graph, value, region.anchor):
        return ""
    if not region.integer:
        return value if graph.tensor(value).dtype == "float32" else ""
    found, node = dequantized(graph, value), graph.producer.get(value)
    return found[0] if found is not None and node is not None and _alone(graph, found[0], node) else ""


def _alone(graph: Graph, value: str, reader: Node) -> bool:
    return value not in graph.outputs and graph.sole_user(value) is reader


def averaged(graph: Graph, kernel: Kernel, pool: Region) -> Kernel | None:
    """The kernel with the pool behind it; None where that changes what the pool reads or writes."""
    if not isinstance(kernel.spec, ConvSpec) or kernel.order or len(graph.tensor(pool.anchor.inputs[0]).dims) != 4:
        return None
    read = dequantized(graph, pool.anchor.inputs[0]) if pool.integer else None
    written = quantization(graph, pool.epilogue[-1]) if pool.epilogue else None
    if (pool.integer and (read is None or not read[1].whole)) or (pool.epilogue and (written is None or not written.whole)):
        return None
    mean = Mean(float(read[1].scale), int(read[1].zero_point)) if read else Mean()
    behind = (Quantize(float(written.scale), int(written.zero_point), written.dtype),) if written else ()
    dims, dtype = graph.tensor(pool.output).dims, graph.tensor(pool.output).dtype
    spec = dataclasses.replace(kernel.spec, out_dtype=dtype, epilogue=(*kernel.spec.epilogue, mean, *behind))
    shape = (dims[0], 1, 1, dims[1]) if len(dims) == 4 else dims
    return dataclasses.replace(kernel, spec=spec, shape=shape, dtype=dtype, last=len(dims) == 4)
