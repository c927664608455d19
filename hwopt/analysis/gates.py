"""Gates: a value times a function of itself, in the spellings that kernels know."""

from __future__ import annotations

from hwopt.ir import Graph, Node


def self_gated(graph: Graph, value: str) -> tuple[Node, ...]:
    """The nodes of x * sigmoid(a x), HardSwish or x * 0.5 * (1 + erf(x / sqrt(2))) behind a value; () if others read it."""
    users = graph.users.get(value, ())
    if len(users) != 2 or value in graph.outputs:
        return ()
    for inner, product in (users, users[::-1]):
        found = _gate(graph, value, inner, product) if product.op == "Mul" else ()
        if found and graph.tensor(found[-1].output) == graph.tensor(value):  # no factor brings axes of its own
            return found
    return ()


def gate_slope(graph: Graph, nodes: tuple[Node, ...]) -> float:
    """a of the nodes of x * sigmoid(a x)."""
    number = _number(graph, nodes[0]) if nodes[0].op in ("Mul", "Div") else 1.0
    return 1.0 if number is None else 1 / number if nodes[0].op == "Div" else number


def _gate(graph: Graph, value: str, inner: Node, product: Node) -> tuple[Node, ...]:
    if inner.op == "Sigmoid" or _is_hard_swish(inner):
        return (inner, product) if graph.sole_user(inner.output) is product else ()
    sigmoid = graph.sole_user(inner.output)
    if sigmoid is not None and sigmoid.op == "Sigmoid" and _is_scaled(graph, inner, value):
        return (inner, sigmoid, product) if graph.sole_user(sigmoid.output) is product else ()
    return _gelu(graph, value, inner, product)


def _is_hard_swish(inner: Node) -> bool:
    """True if x times this node's result is HardSwish."""
    return inner.op == "HardSigmoid" and abs(inner.attr("alpha", 0.2) - 1 / 6) < 1e-6 and inner.attr("beta", 0.5) == 0.5


def _gelu(graph: Graph, value: str, first: Node, product: Node) -> tuple[Node, ...]:
    """Div|Mul -> Erf -> Add 1 -> Mul by the value [-> Mul 0.5]; the half may stand anywhere among the factors."""
    chain = [first]
    while chain[-1] is not product and len(chain) < 6:
        user = graph.sole_user(chain[-1].output)
        if user is None:
            return ()
        chain.append(user)
    if chain[-1] is not product or not _is_scaled(graph, first, value, 2**-0.5):
        return ()
    inner = [node for node in chain[1:-1] if not _is_scaled(graph, node, "", 0.5)]
    if [node.op for node in inner] != ["Erf", "Add"] or _number(graph, inner[1]) != 1.0:
        return ()
    if len(chain) == 5:
        return tuple(chain)
    half = graph.sole_user(product.output)
    return (*chain, half) if half is not None and _is_scaled(graph, half, product.output, 0.5) else ()


def _is_scaled(graph: Graph, node: Node, value: str, factor: float | None = None) -> bool:
    """True if the node multiplies `value` ("" for any) by this number, or by any."""
    number = _number(graph, node)
    if number is None or node.op not in ("Mul", "Div") or (value and value not in node.inputs):
        return False
    if node.op == "Div" and (graph.constant(node.inputs[1]) is None or number == 0):
        return False
    return (
        factor is None or abs((1 / number if node.op == "Div" else number) - factor) < 1e-4
    )  # exporters round sqrt(2) to what they like


def _number(graph: Graph, node: Node) -> float | None:
    """The one-element constant among the inputs of a binary node."""
    found = [array for array in map(graph.constant, node.inputs) if array is not None and array.size == 1]
    return float(found[0].reshape(())) if len(found) == 1 and len(node.inputs) == 2 else None
