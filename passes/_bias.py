"""Bias correction: what a change of the weights shifts the outputs by on average is taken off the bias again.

Nagel et al., "Data-free quantization through weight equalization and bias correction", ICCV 2019, section 4.2; here from
calibration data. Exact for Gemm, MatMul and 1x1 convolutions; padded convolutions see a smaller mean at their borders.
"""

from __future__ import annotations

import numpy as np

from hwopt.ir import Edit, Graph, Node, part


def bias_place(graph: Graph, node: Node) -> tuple[Node, int] | None:
    """The node that adds the constant bias of a layer, and at which input (for Conv and Gemm perhaps a new one); or None."""
    channels = graph.tensor(node.output).shape
    if node.op == "MatMul":
        adder = graph.sole_user(node.output)
        if adder is None or adder.op != "Add":
            return None
        index = 1 if adder.inputs[0] == node.output else 0
        bias = graph.constant(adder.inputs[index])
        return (adder, index) if bias is not None and channels and bias.shape == (channels[-1],) else None
    if node.op == "Gemm" and node.attr("beta", 1.0) == 0:
        return None
    if len(node.inputs) < 3 or not node.inputs[2]:
        return node, 2
    bias = graph.constant(node.inputs[2])
    return (node, 2) if bias is not None and bias.ndim == 1 and bias.size > 1 else None


def mean_shift(node: Node, change: np.ndarray, means: np.ndarray) -> np.ndarray:
    """[outputs]: what a change of the stored weights adds to the outputs, given the mean of every input channel."""
    if node.op != "Conv":
        shift = means @ (change.T if node.attr("transB", 0) else change)
        return float(node.attr("alpha", 1.0)) / float(node.attr("beta", 1.0)) * shift
    groups = int(node.attr("group", 1))
    taps = change.reshape(*change.shape[:2], -1).sum(axis=-1)
    return np.sum(taps * np.repeat(means.reshape(groups, -1), len(change) // groups, axis=0), axis=1)


def correct_bias(edit: Edit, graph: Graph, node: Node, shift: np.ndarray) -> None:
    """Take `shift` off the bias of a layer that has a place for one."""
    place = bias_place(graph, node)
    if place is None:
        return
    holder, index = place
    old = graph.params.get(holder.inputs[index]) if len(holder.inputs) > index else None
    bias = -shift if old is None else old - shift
    dtype = graph.params[node.inputs[1]].dtype if old is None else old.dtype
    name = edit.param(part(node, "bias"), bias.astype(dtype))
    edit.replace(holder, inputs=(*holder.inputs[:index], name, *holder.inputs[index + 1 :]))
