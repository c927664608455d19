"""Targets in TOML files: what they mean, and errors that name file, line and key."""

from __future__ import annotations

from pathlib import Path

import pytest

from hwopt.errors import UsageError
from hwopt.plugins import find_target, find_target_files
from hwopt.target import Workload

SYSTOLIC = """\
# an array as small as Gemmini's
name = "my-npu"
kind = "systolic"

rows = 16
columns = 16
clock_hz = 1e9
input_bytes = 131072
weight_bytes = 131072
output_bytes = 65536
dram_bytes_per_second = 16e9
"""
CPU = """\
name = "my-board"
kind = "cpu"
summary = "a board with two caches"
machine = "aarch64"
cores = 4
clock_hz = 1.8e9
float32_ops_per_cycle = 8
int8_ops_per_cycle = 32
features = ["asimd", "asimddp"]

[[memories]]
name = "l1"
bytes = 32768
bytes_per_second = 28.8e9

[[memories]]
name = "dram"
bytes = 4294967296
bytes_per_second = 4e9
"""
GPU = """\
name = "my-gpu"
kind = "gpu"
arch = "sm_75"
sms = 40
float32_ops_per_second = 8.1e12
float16_ops_per_second = 65e12
int8_ops_per_second = 130e12
launch_seconds = 4e-6
memories = [
  {name = "l2", bytes = 4194304, bytes_per_second = 1.3e12, joules_per_byte = 30e-12},
  {name = "gddr6", bytes = 17179869184, bytes_per_second = 320e9},
]
"""
NPU = """\
name = "my-u55"
kind = "npu"
pixels = 4
channels = 8
depth = 8
clock_hz = 500e6
sram_bytes = 2097152
sram_bytes_per_second = 4e9
weight_bytes_per_second = 0.5e9
"""
FILES = {"systolic": SYSTOLIC, "cpu": CPU, "gpu": GPU, "npu": NPU}
LAYER = Workload(
    "layer", "conv", "int8", m=196, n=256, k=1152, elements=50_176, read_bytes=25_088, write_bytes=50_176, weight_bytes=294_912
)


def written(folder: Path, text: str) -> str:
    path = folder / "mine.toml"
    path.write_text(text)
    return str(path)


def test_there_is_an_example_of_every_kind() -> None:
    assert set(FILES) == set(find_target_files())


@pytest.mark.parametrize("kind", FILES)
def test_a_file_is_a_target_like_any_other(kind: str, tmp_path: Path) -> None:
    target = find_target(written(tmp_path, FILES[kind]))
    assert target.name.startswith("my-")
    assert target.kind in ("cpu", "gpu", "asic")
    cost = target.cost.estimate(LAYER, target.cores)
    assert cost.low is not None and cost.high is not None
    assert 0 < cost.low <= cost.seconds <= cost.high
    assert target.tvm["kind"] in ("llvm", "cuda")


@pytest.mark.parametrize(("kind", "same"), [("systolic", "systolic-16x16"), ("gpu", "nvidia-t4"), ("npu", "ethos-u55")])
def test_the_numbers_of_a_preset_give_its_cost(kind: str, same: str, tmp_path: Path) -> None:
    mine = find_target(written(tmp_path, FILES[kind])).cost.estimate(LAYER, 1)
    assert mine.seconds == pytest.approx(find_target(same).cost.estimate(LAYER, 1).seconds)


def test_a_weight_stationary_array_of_ones_own_has_code(tmp_path: Path) -> None:
    assert find_target(written(tmp_path, SYSTOLIC)).array == find_target("systolic-16x16").array
    assert find_target(written(tmp_path, SYSTOLIC + 'dataflow = "os"')).array is None


def test_features_choose_the_kernels_of_a_processor(tmp_path: Path) -> None:
    target = find_target(written(tmp_path, CPU))
    assert target.microkernels["int8"].intrinsic == "llvm.aarch64.neon.sdot"
    assert target.summary == "a board with two caches"
    assert target.cores == 4
    plain = find_target(written(tmp_path, CPU.replace('"asimd", "asimddp"', "")))
    assert plain.microkernels["int8"].intrinsic == "llvm.aarch64.neon.smull"


WRONG = [  # what is changed in which file, the line that is named, and a part of the message
    ("systolic", "rows = 16", "rowz = 16", 5, "rowz: unknown key; did you mean rows?"),
    ("systolic", "rows = 16", 'rows = "16"', 5, "rows: needs a whole number, not '16'"),
    ("systolic", "rows = 16", "rows = 1.5", 5, "rows: needs a whole number, not 1.5"),
    ("systolic", "rows = 16", "rows = true", 5, "rows: needs a whole number, not True"),
    ("systolic", "columns = 16", "columns = 0", 6, "columns: needs a number above zero"),
    ("systolic", "clock_hz = 1e9", "clock_hz = inf", 7, "clock_hz: needs a number above zero"),
    ("systolic", "rows = 16", "rows = 1000000000000", 5, "rows: 1000000000000 is not within 1 to 4096"),
    ("systolic", "clock_hz = 1e9", "clock_hz = 1.0", 7, "clock_hz: 1.0 is not within 1000 to 1e+11"),
    (
        "systolic",
        "input_bytes = 131072",
        "input_bytes = 2000000000000000",
        8,
        "input_bytes: 2000000000000000 is not within 1 to 1e+15",
    ),
    ("cpu", "cores = 4", "cores = 5000", 5, "cores: 5000 is not within 1 to 4096"),
    ("cpu", "bytes = 32768", "bytes = 2000000000000000", 13, "bytes: 2000000000000000 is not within 1 to 1e+15"),
    ("gpu", "bytes_per_second = 1.3e12", "bytes_per_second = 1e30", 10, "bytes_per_second: 1e+30 is not within 1 to 1e+18"),
    ("systolic", "rows = 16\n", "", 3, "kind: lacks rows"),
    ("systolic", 'kind = "systolic"', 'kind = "sistolic"', 3, "kind: unknown kind 'sistolic'; did you mean systolic?"),
    ("systolic", 'name = "my-npu"', 'name = "my npu"', 2, "name: 'my npu' is no name"),
    ("systolic", "rows = 16", 'rows = 16\ndataflow = "rs"', 6, "dataflow: 'rs' is not one of ws, os, is"),
    ("systolic", "rows = 16", "rows = 16\ndouble_buffered = 1", 6, "double_buffered: needs true or false, not 1"),
    ("cpu", "bytes_per_second = 4e9", "bytes_per_second = -1", 19, "bytes_per_second: needs a number above zero"),
    ("cpu", "bytes_per_second = 4e9", "speed = 4e9", 19, "speed: unknown key"),
    ("cpu", "bytes = 4294967296", "bytes = 4096", 16, "memories: memories stand nearest first"),
    ("cpu", 'features = ["asimd", "asimddp"]', "features = 3", 9, "features: needs a list"),
    ("cpu", 'features = ["asimd", "asimddp"]', "features = [3]", 9, "features: needs a text, not 3"),
    (
        "cpu",
        '"asimddp"]',
        '"asimddq"]',
        9,
        "features: no feature 'asimddq' of aarch64 in /proc/cpuinfo's words; did you mean asimddp?",
    ),
    ("gpu", '{name = "gddr6", bytes = 17179869184, bytes_per_second = 320e9}', "3", 9, "memories: needs tables"),
    ("gpu", 'arch = "sm_75"', 'arch = "sm_61"', 3, "arch: 'sm_61' is not one of sm_75"),
    ("gpu", '  {name = "gddr6", bytes = 17179869184, bytes_per_second = 320e9},\n', "", 9, "memories: a GPU has two memories"),
]


@pytest.mark.parametrize(("kind", "old", "new", "line", "message"), WRONG, ids=[one[-1] for one in WRONG])
def test_errors_name_file_line_and_key(kind: str, old: str, new: str, line: int, message: str, tmp_path: Path) -> None:
    assert old in FILES[kind]
    path = written(tmp_path, FILES[kind].replace(old, new))
    with pytest.raises(UsageError) as caught:
        find_target(path)
    assert f"{path}:{line}: {message}" in str(caught.value)


def test_what_is_no_toml_or_no_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"mine.toml: is no TOML: .*line 1"):
        find_target(written(tmp_path, "name = = 3"))
    with pytest.raises(UsageError, match=r"nothing.toml: no such target file"):
        find_target(str(tmp_path / "nothing.toml"))
    with pytest.raises(UsageError, match="needs a text 'kind'"):
        find_target(written(tmp_path, 'name = "x"'))


def test_a_feature_that_is_like_no_known_one_is_a_newer_processors(tmp_path: Path) -> None:
    file = tmp_path / "newer.toml"
    file.write_text(CPU.replace('"asimddp"]', '"asimddp", "matrix9000"]'))
    assert find_target(str(file)).name == "my-board"
