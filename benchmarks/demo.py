"""Suite `demo`: the README's table, from the demo run as `make demo` runs it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from benchmarks.layout import Row, higher_is_better, lower_is_better, result
from hwopt.demo import run_demo


def run(threads: int | None = None) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        report = run_demo(Path(folder) / "demo", threads=threads)
    ours, base = report["result"], report["baseline"]
    peer = report["peers"]["onnxruntime"]["latency_seconds"]
    rows: list[Row] = [
        lower_is_better("demo", "latency", "s", ours["latency_seconds"], {"hwopt float": base["latency_seconds"]}),
        lower_is_better("demo", "latency", "s", ours["latency_seconds"], {"onnxruntime float": peer}),
        lower_is_better("demo float", "latency", "s", base["latency_seconds"], {"onnxruntime float": peer}),
        lower_is_better("demo", "weights", "B", ours["weight_bytes"], {"hwopt float": base["weight_bytes"]}),
        lower_is_better(
            "demo", "activations", "B", ours["peak_activation_bytes"], {"hwopt float": base["peak_activation_bytes"]}
        ),
        higher_is_better("demo", report["metric"], "1", ours["score"], {"hwopt float": base["score"]}),
    ]
    low, high = report["score_drop_interval"]
    summary = {
        "speedup": report["speedup"], "compression": report["compression"],
        "library_compression": report["library_compression"], "score_drop": report["score_drop"],
        "score_drop_low": low, "score_drop_high": high, "vs_onnxruntime": report["peers"]["onnxruntime"]["ratio"],
        "float_vs_onnxruntime": peer / base["latency_seconds"], "threads": report["threads"],
    }  # fmt: skip
    return result("demo", rows, summary)
