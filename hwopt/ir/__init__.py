"""The graph IR: immutable graphs with ONNX operator semantics."""

from hwopt.ir.graph import Attr, Edit, Graph, Node, frozen
from hwopt.ir.infer import infer_types
from hwopt.ir.match import descended, descends, of_op, part, scalar
from hwopt.ir.text import diff, to_text
from hwopt.ir.types import OpaqueType, TensorType, ValueType, bits_of, numpy_dtype, onnx_dtype, type_of
from hwopt.ir.verify import verify

__all__ = [
    "Attr", "Edit", "Graph", "Node", "OpaqueType", "TensorType", "ValueType", "bits_of", "descended", "descends", "diff",
    "frozen", "infer_types", "numpy_dtype", "of_op", "onnx_dtype", "part", "scalar", "to_text", "type_of", "verify",
]  # fmt: skip
