"""CMake builds again what an input made, once, and nothing else; the program needs nothing of what built it.

The compiler itself is an input: these builds run a copy of hwopt that can be changed.
"""

from __future__ import annotations

import os
import shutil
import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest

from hwopt.cli import main
from hwopt.emit.cpu import host_machine
from hwopt.emit.elf import machine_of
from tests.test_build_systems import EXAMPLES, ROOT, built_at, call, models, needs, touch

SMALL, OTHER = "build/small.hwopt/libsmall.a", "build/other.hwopt/libother.a"
INPUTS = {  # what changes, and the libraries that it makes
    "small.onnx": {SMALL},
    "small.npz": {SMALL},
    "board.toml": {SMALL},
    "tuned.jsonl": {SMALL},
    "other.data": {OTHER},
    "other.json": {OTHER},
    "site/hwopt/ir/graph.py": {SMALL, OTHER},
}
BOARD = """name = "board"
kind = "cpu"
machine = "{machine}"
cores = 1
clock_hz = 2e9
float32_ops_per_cycle = 8
int8_ops_per_cycle = 8
memories = [{{ name = "dram", bytes = 1_000_000_000, bytes_per_second = 1e9 }}]
"""
DELIVERED = {"linux-vdso.so.1", "libc.so.6", "libm.so.6", "libpthread.so.0", "libgomp.so.1"}
LOADERS = ("ld-linux", "ld-musl")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """hwopt as pip installs it."""
    folder = tmp_path_factory.mktemp("rebuilds") / "site"
    for name in ("hwopt", "passes", "targets"):
        shutil.copytree(ROOT / name, folder / name)
    release(folder, "1.0")
    return folder


def release(site: Path, version: str) -> None:
    """What pip writes of a release, in place of the one before."""
    for old in site.glob("hwopt-*.dist-info"):
        shutil.rmtree(old)
    info = site / f"hwopt-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: hwopt\nVersion: {version}\n")
    (info / "RECORD").write_text(f"{info.name}/METADATA,,\n{info.name}/RECORD,,\n")
    (info / "entry_points.txt").write_text(distribution("hwopt").read_text("entry_points.txt") or "")


@pytest.fixture(params=["Ninja", "Unix Makefiles"])
def project(request: pytest.FixtureRequest, site: Path, tmp_path: Path) -> Path:
    """The example, built for the first time."""
    needs("cmake", "ninja" if request.param == "Ninja" else "make", "c++")
    models(tmp_path)
    for name in ("main.c", "main.cc", "cmake/CMakeLists.txt"):
        shutil.copy(EXAMPLES / name, tmp_path)
    (tmp_path / "board.toml").write_text(BOARD.format(machine=host_machine()))
    (tmp_path / "tuned.jsonl").write_text("")
    plan(tmp_path)
    (tmp_path / "site").symlink_to(site)
    folder = call(sys.executable, "-m", "hwopt", "--cmake-dir", folder=tmp_path, **using(tmp_path)).strip()
    assert Path(folder).parent.parent == tmp_path / "site"
    options = (f"-Dhwopt_DIR={folder}", f"-DHWOPT_PYTHON={sys.executable}")
    call("cmake", "-S", ".", "-B", "build", "-G", request.param, *options, folder=tmp_path, **using(tmp_path))
    build(tmp_path)
    return tmp_path


def plan(folder: Path) -> None:
    """other.json: a plan that changes nothing."""
    with pytest.raises(SystemExit):
        main(["plan", str(folder / "other.onnx"), "-o", str(folder / "other.json"), "--target", "x86-64-v3"])


def using(project: Path) -> dict[str, str]:
    """The copy of hwopt, and a cache that outlives the project: what is built again is often a copy."""
    return {"PYTHONPATH": str(project / "site"), "HWOPT_CACHE_DIR": str((project / "site").resolve().with_name("cache"))}


def build(project: Path) -> None:
    call("cmake", "--build", "build", "-j", "2", folder=project, **using(project))


@pytest.mark.slow
def test_cmake_builds_again_what_an_input_made_once_and_nothing_else(project: Path) -> None:
    call("ctest", "--test-dir", "build", "--output-on-failure", folder=project)
    before = built_at(project, SMALL, OTHER, "build/app")
    build(project)
    assert built_at(project, SMALL, OTHER, "build/app") == before, "nothing changed, nothing is built"
    for changed, libraries in INPUTS.items():
        touch(project / changed)
        check_rebuilt(project, libraries, changed)
    release(project / "site", "2.0")
    check_rebuilt(project, {SMALL, OTHER}, "hwopt's version")
    release(project / "site", "1.0")


def check_rebuilt(project: Path, libraries: set[str], changed: str) -> None:
    before = built_at(project, SMALL, OTHER)
    build(project)
    after = built_at(project, SMALL, OTHER)
    assert {name for name in after if after[name] != before[name]} == libraries, changed
    build(project)
    assert built_at(project, SMALL, OTHER) == after, f"{changed} is built once"


@pytest.mark.parametrize("project", ["Unix Makefiles"], indirect=True)
def test_the_program_runs_where_there_is_nothing_but_its_libraries(project: Path) -> None:
    needs("ldd")
    shown = call("ldd", "build/app", folder=project).splitlines()
    needed = {line.split()[0].rpartition("/")[2] for line in shown}
    assert {name for name in needed if not name.startswith(LOADERS)} <= DELIVERED
    wanted = call("build/app", folder=project)
    assert call(project / "build/app", folder=project, PATH="/nowhere", LD_LIBRARY_PATH="", PYTHONPATH="") == wanted
    if os.geteuid() or not shutil.which("chroot"):
        pytest.skip("only root can show it in a chroot")
    room = project / "room"
    for line in shown:
        for word in line.split():
            if word.startswith("/"):
                (room / word[1:]).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(word, room / word[1:])
    shutil.copy(project / "build/app", room)
    assert call("chroot", room, "/app", folder=project) == wanted
    inside = {path.name for path in room.rglob("*") if path.is_file()}
    assert inside <= {"app", *needed}, "neither Python nor TVM"


TOOLCHAIN = """set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_C_COMPILER aarch64-linux-gnu-gcc)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_CROSSCOMPILING_EMULATOR qemu-aarch64;-L;/usr/aarch64-linux-gnu)
"""


@pytest.mark.slow
def test_a_toolchain_file_cross_compiles_and_ctest_runs_it_under_emulation(tmp_path: Path) -> None:
    needs("cmake", "ninja", "aarch64-linux-gnu-gcc", "aarch64-linux-gnu-g++", "qemu-aarch64")
    models(tmp_path)
    for name in ("main.c", "main.cc", "cmake/CMakeLists.txt"):
        shutil.copy(EXAMPLES / name, tmp_path)
    (tmp_path / "board.toml").write_text(BOARD.format(machine="aarch64"))
    (tmp_path / "tuned.jsonl").write_text("")
    plan(tmp_path)
    (tmp_path / "arm.cmake").write_text(TOOLCHAIN)
    options = (f"-Dhwopt_DIR={ROOT / 'hwopt' / 'cmake'}", f"-DHWOPT_PYTHON={sys.executable}", "-DCMAKE_TOOLCHAIN_FILE=arm.cmake")
    call("cmake", "-S", ".", "-B", "build", "-G", "Ninja", *options, folder=tmp_path)
    call("cmake", "--build", "build", folder=tmp_path)
    assert machine_of((tmp_path / "build/app").read_bytes()) == "aarch64"
    call("ctest", "--test-dir", "build", "--output-on-failure", folder=tmp_path)
