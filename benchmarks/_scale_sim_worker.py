"""Runs inside of SCALE-Sim's own environment: questions as JSON lines on stdin, answers on stdout. Needs nothing of hwopt."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from importlib.metadata import version
from typing import Any

from scalesim.layout_utils import layouts
from scalesim.scale_config import scale_config
from scalesim.single_layer_sim import single_layer_sim
from scalesim.topology_utils import topologies


def simulate(job: dict[str, Any]) -> dict[str, Any]:
    """Total cycles from the first demand on (the first fill comes before them) and how many of them are stalls for DRAM."""
    layer = single_layer_sim()
    layer.set_params(0, configuration(job), topology(job), layouts(), verbose=False)
    layer.run()
    _, total, stalls = layer.get_compute_report_items()[:3]
    return {"key": job["key"], "total": int(total), "stalls": int(stalls), "version": version("scalesim")}


def configuration(job: dict[str, Any]) -> scale_config:
    """A square array, three equal scratchpads, and DRAM ports of the given elements a cycle for each of them."""
    found = scale_config()
    found.array_rows = found.array_cols = job["side"]
    found.ifmap_sz_kb = found.filter_sz_kb = found.ofmap_sz_kb = job["kib"]
    found.df, found.use_user_bandwidth, found.bandwidths = job["dataflow"], True, [job["bandwidth"]]
    found.ifmap_sram_bank_bandwidth = found.filter_sram_bank_bandwidth = job["bandwidth"]
    found.ifmap_sram_bank_num = found.filter_sram_bank_num = 1
    found.force_valid()
    return found


def topology(job: dict[str, Any]) -> topologies:
    """[m, k] x [k, n] as its GEMM input format has it: an image of m rows and a filter of one."""
    found = topologies()
    found.topo_arrays.append([job["key"], job["m"], job["k"], 1, job["k"], 1, job["n"], 1, 1, 1, 1])
    found.topo_load_flag, found.num_layers = True, 1
    found.topo_calc_hyperparams()
    return found


for line in sys.stdin:
    with contextlib.redirect_stdout(io.StringIO()):  # it talks
        answer = simulate(json.loads(line))
    print(json.dumps(answer), flush=True)
