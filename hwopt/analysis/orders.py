"""In which order of axes the data of kernels lie that only move them: as ONNX has it, or channels last.

Convolutions and pools write images channels last, and what is elementwise follows. A Reshape, a product or whatever else counts
axes as ONNX does makes a copy in ONNX's order, which later readers that move data take instead: the same Concat then gathers
single elements where it could copy rows. The backend decides so while it lowers; this follows the same rules on the graph alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from hwopt.analysis.regions import ELEMENTWISE, VIEWS, Region
from hwopt.ir import Graph

IMAGES = ("Conv", "ConvTranspose", "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool")
FOLLOW = ("Concat", "Split", "Slice", "Pad", "Resize", "Upsample", "DepthToSpace", "SpaceToDepth")
Orders = dict[str, set[str]]  # of each value: `first`, `last`, or both; nothing where it has not been computed


def orders(graph: Graph, found: Sequence[Region]) -> dict[str, str]:
    """By the names of regions that move data: `first` or `last`, as their source lies, of transpositions also as their first
    reader wants the result, and ` view` where nothing else reads the Reshape in front, which is then part of the kernel."""
    known: Orders = {name: {"first"} for name in graph.inputs}
    named: dict[str, str] = {}
    waiting: dict[str, str] = {}  # results of transpositions, which are computed where they are read
    for region in found:
        wants = _wanted(graph, region, known)
        for value in region.inputs:
            if value in waiting and region.anchor.op in VIEWS and _alone(graph, value):
                waiting[region.output] = waiting.pop(value)  # the one behind the view decides
            elif value in waiting:
                named[waiting.pop(value)] += f" {wants}"
            if value not in graph.params and not (wants == "last" and _swallowed(region)):
                known.setdefault(value, set()).add(wants)
        made = _made(region, wants, known)
        if region.kind == "move" and region.anchor.op not in VIEWS:
            follows = region.anchor.op in FOLLOW and made != wants
            named[region.name] = wants + (f" {made}" if follows else "") + _cut(graph, region)
        if region.anchor.op == "Transpose":
            waiting[region.output] = region.name
        pending = region.anchor.op == "Transpose" and wants == "first"  # emitted where its result is read
        known[region.output] = set() if pending else {made}
    return {name: facts + _behind_view(graph, region) for region in found if (facts := named.get(name := region.name))}


def _wanted(graph: Graph, region: Region, known: Orders) -> str:
    """The order in which a region reads its data."""
    source = next((value for value in region.inputs if value not in graph.params), "")
    lies, op = known.get(source, set()), region.anchor.op
    rank = len(graph.tensor(region.output).shape or ())
    if op in IMAGES:
        return "last" if rank >= 3 else "first"
    if op in ("Resize", "Upsample") or (op in ELEMENTWISE and rank >= 3):
        read = [known.get(value, set()) for value in region.inputs if len(graph.tensor(value).shape or ()) == rank]
        return "last" if any("last" in one for one in read) else "first"
    follows = op in (*FOLLOW, "Transpose", "Softmax") or op.startswith("Reduce")
    return "last" if follows and lies == {"last"} else "first"


def _swallowed(region: Region) -> bool:
    """True where a transposition of the data becomes part of the kernel: nobody else finds a copy."""
    return region.anchor.op in (*ELEMENTWISE, *FOLLOW)


def _made(region: Region, wants: str, known: Orders) -> str:
    """The order in which a region writes: what moves images leaves them channels last, reductions leave rows."""
    op = region.anchor.op
    if op in FOLLOW and op != "Pad":
        return "last" if any("last" in known.get(value, ()) for value in region.inputs) else wants
    return wants if op in IMAGES or op in FOLLOW or op in ELEMENTWISE or op == "Softmax" else "first"


def _cut(graph: Graph, region: Region) -> str:
    """Of a Concat the size that every part is a multiple of: vectors that cross a border are filled one by one."""
    if region.anchor.op != "Concat":
        return ""
    shapes = [graph.tensor(value).shape or () for value in region.anchor.inputs]
    sizes = [shape[axis] for shape in shapes if -len(shape) <= (axis := region.anchor.attr("axis", 0)) < len(shape)]
    return f" of {math.gcd(*(size for size in sizes if isinstance(size, int)))}"


def _behind_view(graph: Graph, region: Region) -> str:
    source = region.anchor.inputs[0] if region.anchor.op == "Transpose" else ""
    made = graph.producer.get(source)
    return " view" if made is not None and made.op in VIEWS and _alone(graph, source) else ""


def _alone(graph: Graph, value: str) -> bool:
    """True for a value that one node reads and nobody else sees."""
    return len(graph.users.get(value, ())) == 1 and value not in graph.outputs
