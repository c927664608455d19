"""Other runtimes on the same model, inputs, threads and calibration data: ONNX Runtime, OpenVINO with NNCF, torch.compile.

Every maker returns a call without arguments; what a package cannot do raises, and the caller reports the reason.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.zoo import Case, Missing, cache

Run = Callable[[], object]
Maker = Callable[[Case, bytes, int], Run]  # the case, its normalised model as ONNX bytes, threads


def peers_of(dtype: str, features: frozenset[str], slow: bool = False) -> Mapping[str, Maker]:
    """The peers at a precision by name; bf16 competes with int8 because users may choose either."""
    half = {"openvino bf16": openvino_bf16} if {"avx512_bf16", "amx_bf16", "bf16"} & features else {}
    if dtype == "int8":
        return {"onnxruntime int8": onnxruntime_int8, "openvino int8": openvino_int8, **half}
    if dtype == "bf16":
        return half
    compiled = {"torch.compile f32": torch_compile} if slow else {}
    return {"onnxruntime f32": onnxruntime_float, "openvino f32": openvino_float, **compiled}


def onnxruntime_float(case: Case, model: bytes, threads: int) -> Run:
    return _onnxruntime(case, model, threads)


def onnxruntime_int8(case: Case, model: bytes, threads: int) -> Run:
    """Its own static quantization: QDQ, uint8 activations, int8 weights per channel."""
    return _onnxruntime(case, _kept(case, model, "onnxruntime", ".onnx", _quantized_by_onnxruntime).read_bytes(), threads)


def _onnxruntime(case: Case, model: bytes, threads: int) -> Run:
    import onnxruntime

    options = session_options(threads)
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    for name, array in case.feeds.items():
        binding.bind_cpu_input(name, array)
    for output in session.get_outputs():
        binding.bind_output(output.name)
    return lambda: session.run_with_iobinding(binding)


def session_options(threads: int) -> Any:
    """As many threads, none of which spins on beyond a run: it would keep a core from the runtime whose turn is next.

    Measured with ResNet-18 on two cores: OpenVINO took 14 ms beside threads that spin and 8 ms without; ONNX Runtime itself
    takes as long either way.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 4
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def _quantized_by_onnxruntime(case: Case, model: bytes, path: Path) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        rows = iter(case.batches())

        def get_next(self) -> Mapping[str, np.ndarray] | None:
            return next(self.rows, None)

    source, prepared = path.with_suffix(".in.onnx"), path.with_suffix(".prepared.onnx")
    source.write_bytes(model)
    quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
    quantize_static(
        str(prepared), str(path), Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
        extra_options={"QDQDisableWeightAdjustForInt32Bias": True},  # 1.31 fails in it where a bias belongs to no channel axis
    )  # fmt: skip
    source.unlink()
    prepared.unlink()


def openvino_float(case: Case, model: bytes, threads: int) -> Run:
    return openvino_run(case.feeds, model, threads, "f32")


def openvino_bf16(case: Case, model: bytes, threads: int) -> Run:
    return openvino_run(case.feeds, model, threads, "bf16")


def openvino_int8(case: Case, model: bytes, threads: int) -> Run:
    """Quantized by NNCF; what stays float runs in the precision that OpenVINO itself chooses (bf16 where the CPU has it)."""
    return openvino_run(case.feeds, _kept(case, model, "nncf", ".xml", _quantized_by_nncf), threads, "")


def openvino_run(feeds: Mapping[str, np.ndarray], model: bytes | Path, threads: int, precision: str) -> Run:
    request = openvino_request(feeds, model, threads, precision)
    return lambda: request.infer(share_outputs=True)


def openvino_request(feeds: Mapping[str, np.ndarray], model: bytes | Path, threads: int, precision: str, **more: object) -> Any:
    """Latency mode, one stream, inputs bound once."""
    openvino = _package("openvino")
    options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, **more}
    if precision:
        options["INFERENCE_PRECISION_HINT"] = precision
    core = openvino.Core()
    read = core.read_model(model if isinstance(model, bytes) else str(model))
    request = core.compile_model(read, "CPU", options).create_infer_request()
    for name, array in feeds.items():
        request.set_tensor(name, openvino.Tensor(array, shared_memory=True))
    return request


def _quantized_by_nncf(case: Case, model: bytes, path: Path) -> None:
    openvino = _package("openvino")
    os.environ.setdefault("NNCF_CI", "1")  # NNCF's own switch against sending usage statistics
    nncf = _package("nncf")
    batches = case.batches()
    kind = {"model_type": nncf.ModelType.TRANSFORMER} if case.kind == "transformer" else {}
    read = openvino.Core().read_model(model)
    quantized = nncf.quantize(read, nncf.Dataset(batches), subset_size=len(batches), **kind)
    openvino.save_model(quantized, str(path), compress_to_fp16=False)


def torch_compile(case: Case, model: bytes, threads: int) -> Run:
    """The same graph as torch operators, compiled by Inductor with all its default optimizations."""
    torch = _package("torch")
    from benchmarks.torch_graph import TorchGraph

    torch.set_num_threads(threads)
    graph = TorchGraph(model).eval()
    module, inputs = torch.compile(graph), [torch.from_numpy(case.feeds[name]) for name in graph.inputs]

    def run() -> object:
        with torch.inference_mode():
            return module(*inputs)

    run()
    return run


def _kept(case: Case, model: bytes, by: str, suffix: str, make: Callable[[Case, bytes, Path], None]) -> Path:
    """A quantized model from the cache, or made now; the key holds the model, the data and the quantizer's version."""
    digest = hashlib.sha256(model)
    for name, array in case.calibrate.items():
        digest.update(name.encode() + array.tobytes())
    digest.update(importlib.metadata.version(by).encode() if by != "nncf" else _package("nncf").__version__.encode())
    folder = cache() / "quantized"
    folder.mkdir(exist_ok=True)
    path = folder / f"{case.name}-b{case.batch}-{by}-{digest.hexdigest()[:16]}{suffix}"
    if not path.exists():
        part = path.with_name(f"{os.getpid()}-{path.name}")
        make(case, model, part)
        for made in sorted(folder.glob(f"{part.stem}.*"), key=lambda one: one.suffix == suffix):  # the main file last
            made.replace(path.with_suffix(made.suffix))
    return path


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Missing(f"not installed ({error})", place=name, hint="pip install 'hwopt[bench]'") from error
