"""Weights as a library holds them: codes where a kernel can decode them, else the numbers that its arithmetic takes."""

from __future__ import annotations

import math

from hwopt.analysis.compressed import Compressed
from hwopt.analysis.memo import remembered
from hwopt.analysis.regions import Region, regions
from hwopt.analysis.size import weight_bytes
from hwopt.analysis.workload import coded_weights
from hwopt.ir import Graph


@remembered
def held_bytes(graph: Graph) -> int:
    """Bytes of weights in a library that is to be small, before layouts pad them: those of the model, codes that no kernel can
    read decoded."""
    decoded: dict[tuple[str, ...], int] = {}
    for region in regions(graph):
        weight = coded_weights(graph, region)
        if weight is not None and undecodable(graph, region, weight):
            decoded[weight.nodes] = _growth(region, weight)  # once for layers that share it
    return weight_bytes(graph) + sum(decoded.values())


def _growth(region: Region, weight: Compressed) -> int:
    """Bytes of the decoded weights less those of the codes; integers keep their scales, floats have them inside."""
    scales = 4 * weight.scales.size if region.integer and weight.scales is not None else 0
    return max(0, weight.codes.size * (1 if region.integer else 4) + scales - weight.bytes)


def undecodable(graph: Graph, region: Region, weight: Compressed) -> str:
    """Why no kernel can decode the weights of a region as it reads them; "" if one can."""
    node = region.anchor
    if graph.tensor(node.output).dtype != "float32" or not graph.tensor(node.output).static:
        return "its results are not float32 of a fixed shape"
    if len(node.inputs) > 2 and node.inputs[2] and node.inputs[2] not in graph.params and not _constant(graph, node.inputs[2]):
        return "its bias is computed"
    if region.integer and weight.bits > 4:
        return "integer kernels look up at most 16 numbers"
    if region.integer and weight.zeros is not None:
        return "integer kernels take weights without zero points"
    if node.op == "Conv":
        kernel = graph.tensor(node.inputs[1]).dims[2:]
        plain = math.prod(kernel) == 1 and node.attr("group", 1) == 1 and not any(node.attr("pads", ()))
        plain = plain and all(one == 1 for one in node.attr("strides", (1,)))
        return "" if plain and node.attr("auto_pad", "NOTSET") == "NOTSET" else "it is no 1 x 1 convolution"
    if node.op == "Gemm" and (node.attr("transA", 0) or node.attr("alpha", 1.0) != 1.0):
        return "its data are transposed or scaled"
    return "" if len(graph.tensor(node.inputs[0]).dims) > 1 else "it multiplies a vector"


def _constant(graph: Graph, value: str) -> bool:
    """A dequantized bias."""
    node = graph.producer.get(value)
    return node is not None and all(read in graph.params for read in node.reads)
