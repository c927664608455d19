"""Run a Graph on ONNX Runtime: the oracle of every test, and the engine of calibration."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
import onnxruntime

from hwopt.errors import ModelError
from hwopt.io.files import above_limit, write_file
from hwopt.io.proto import to_model
from hwopt.ir import Graph


class Session:
    """A Graph loaded into ONNX Runtime. `optimize=False` runs the operators exactly as they stand."""

    def __init__(self, graph: Graph, *, threads: int = 1, optimize: bool = False) -> None:
        options = onnxruntime.SessionOptions()
        level = onnxruntime.GraphOptimizationLevel
        options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 4
        options.add_session_config_entry("session.force_spinning_stop", "1")  # idle threads leave the cores to others
        self.outputs = graph.outputs
        try:
            self._session = _session(graph, options)
        except Exception as error:  # ONNX Runtime raises a kind of its own for every status code
            raise ModelError(f"ONNX Runtime refuses the model: {error}", place=graph.name) from error

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name."""
        return dict(zip(self.outputs, self._session.run(list(self.outputs), dict(feeds)), strict=True))


def _session(graph: Graph, options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
    """From memory where protobuf can hold the model, else through a file with the weights beside it."""
    providers = ["CPUExecutionProvider"]
    if not above_limit(graph):
        return onnxruntime.InferenceSession(to_model(graph).SerializeToString(), options, providers=providers)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        write_file(graph, path)
        return onnxruntime.InferenceSession(str(path), options, providers=providers)


def run(graph: Graph, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """One run, outputs by name; keep a Session for several."""
    return Session(graph).run(feeds)


def observing(graph: Graph, values: Iterable[str]) -> Graph:
    """The graph with these intermediate values as its outputs, in this order (values that are inputs or parameters left out).

    Without the nodes that none of them needs: ONNX Runtime would run these, too.
    """
    wanted = tuple(dict.fromkeys(value for value in values if value in graph.producer))
    needed, nodes = set(wanted), []
    for node in reversed(graph.nodes):
        if needed.intersection(node.outputs):
            nodes.append(node)
            needed.update(node.inputs)
    return dataclasses.replace(graph, outputs=wanted, nodes=tuple(reversed(nodes)), types=MappingProxyType(dict(graph.types)))
