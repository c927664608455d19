"""Models for NVIDIA GPUs: kernels compiled by nvcc and inspected, the host run against a driver that writes down its calls."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

import hwopt
from hwopt.cli import main
from hwopt.emit.cuda import EM_CUDA
from hwopt.emit.elf import functions_of
from hwopt.emit.products import Form
from hwopt.errors import ToolchainError, UnsupportedError, UsageError
from hwopt.io.onnx import save
from tests.test_compiler import pictures, small_net
from tests.test_cross import DEMO

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")

DRIVER = r"""
/* A libcuda that has memory, and prints what it is asked to launch: kernel, blocks, threads, offsets. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
typedef unsigned long long P;
static char *memory;
static size_t most;
static int arguments;
int cuInit(unsigned f) { return (int)f; }
int cuDeviceGet(int *d, int n) { *d = n; return 0; }
int cuDevicePrimaryCtxRetain(void **c, int d) { (void)d; *c = &most; return 0; }
int cuDevicePrimaryCtxRelease_v2(int d) { return d; }
int cuCtxPushCurrent_v2(void *c) { return c != &most; }
int cuCtxPopCurrent_v2(void **c) { *c = NULL; return 0; }
int cuModuleLoadData(void **m, const void *image) { *m = (void *)image; return memcmp(image, "\177ELF", 4); }
int cuModuleUnload(void *m) { return !m; }
int cuModuleGetFunction(void **f, void *m, const char *name) { (void)m; *f = (void *)name; return 0; }
int cuMemAlloc_v2(P *p, size_t n) { most = n; memory = calloc(1, n); *p = (P)(size_t)memory; return !memory; }
int cuMemFree_v2(P p) { free((void *)(size_t)p); puts("freed"); return 0; }
int cuMemcpyHtoD_v2(P to, const void *from, size_t n) {
  printf("in %zu %zu\n", (size_t)to - (size_t)memory, n);
  if (to + n > (P)(size_t)memory + most) return 1;
  memcpy((void *)(size_t)to, from, n);
  return 0;
}
int cuMemcpyDtoH_v2(void *to, P from, size_t n) {
  printf("out %zu %zu\n", (size_t)from - (size_t)memory, n);
  memcpy(to, (void *)(size_t)from, n);
  return 0;
}
int cuLaunchKernel(void *f, unsigned a, unsigned b, unsigned c, unsigned x, unsigned y, unsigned z, unsigned shared, void *s,
                   void **given, void **extra) {
  (void)s, (void)extra, (void)arguments, (void)given;
  printf("launch %s %u,%u,%u %u,%u,%u %u\n", (char *)f, a, b, c, x, y, z, shared);
  return x * y * z == 0 || x * y * z > 1024;
}
"""
MAIN = """
#include "fashion.h"
#include <stdio.h>
static float image[784], classes[10];
int main(void) {
  int code = fashion_run(image, classes, NULL);
  if (!code) code = fashion_run(image, classes, NULL);
  if (fashion_run(NULL, classes, NULL) != HWOPT_ERROR_NULL) code = 1;
  fashion_release();
  fprintf(stderr, "%s\\n", fashion_error(code));
  return code;
}
"""


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> hwopt.Artifact:
    """The demo model in float for a T4."""
    out = tmp_path_factory.mktemp("cuda") / "t4"
    with pytest.raises(SystemExit) as ended:
        main([
            "compile", str(DEMO / "fashion.onnx"), "--shape", "image=1,1,28,28", "--target", "nvidia-t4", "-o", str(out),
            "--emit", "static,object,source,pc", "--no-measure",
        ])  # fmt: skip
    assert ended.value.code == 0
    return hwopt.Artifact(out, foreign=True)


@pytest.mark.slow
def test_every_kernel_of_the_demo_model_is_in_the_cubin_and_the_report_says_that_nothing_ran(artifact: hwopt.Artifact) -> None:
    data = (artifact.path / "fashion.cubin").read_bytes()
    machine, functions = functions_of(data)
    assert machine == EM_CUDA and data[48:52][1] == 75  # e_flags: the architecture
    host = (artifact.path / "fashion.c").read_text()
    launched = {line.split('"')[1] for line in host.splitlines() if line.strip().startswith('{"fashion_')}
    assert len(launched) > 10 and launched <= functions
    assert data in (artifact.path / "libfashion.a").read_bytes() and data in (artifact.path / "fashion.o").read_bytes()
    assert "the kernels for the GPU were compiled and inspected, not run" in artifact.report["notes"]
    assert "-lcuda" in (artifact.path / "fashion.pc").read_text()


@pytest.mark.slow
def test_the_host_launches_the_kernels_in_order_and_copies_what_goes_in_and_out(artifact: hwopt.Artifact, tmp_path: Path) -> None:
    (tmp_path / "driver.c").write_text(DRIVER)
    (tmp_path / "main.c").write_text(MAIN)
    strict = ["-std=c11", "-Wall", "-Wextra", "-Wpedantic", "-Wshadow", "-Werror", "-I", artifact.path]
    folder = artifact.path
    subprocess.run(["cc", *strict, "-c", folder / "fashion.c", folder / "hwopt_cuda.c"], cwd=tmp_path, check=True)
    subprocess.run(["c++", "-Wall", "-Wpedantic", "-Werror", "-fsyntax-only", "-x", "c++", folder / "fashion.h"], check=True)
    sanitized = ["-fsanitize=address,undefined", "-I", folder, "main.c", "driver.c"]
    subprocess.run(["cc", *sanitized, folder / "libfashion.a", "-pthread", "-o", "run"], cwd=tmp_path, check=True)
    done = subprocess.run(["./run"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    weights = (folder / "fashion_weights.bin").stat().st_size
    assert lines[0] == f"in 0 {weights}" and lines[-1] == "freed"
    first, second = (lines[1:-1][: len(lines) // 2 - 1], lines[1:-1][len(lines) // 2 - 1 :])
    assert first == second
    assert first[0].startswith("in ") and first[0].endswith(f" {784 * 4}") and first[-1].endswith(f" {10 * 4}")
    launches = [line for line in first if line.startswith("launch")]
    assert len(launches) == len(first) - 2 == (folder / "fashion.c").read_text().count('{"fashion_')


def test_what_cannot_be_had_for_a_gpu_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(small_net(), tmp_path / "small.onnx")
    with pytest.raises(UsageError, match="linked with libcuda where it runs; --emit static,source"):
        hwopt.compile(tmp_path / "small.onnx", out=tmp_path / "a", target="nvidia-t4")
    options = {"target": "nvidia-t4", "form": Form(("static",)), "measure": False}
    with pytest.raises(UnsupportedError, match="integer kernels for CUDA are not generated"):
        hwopt.compile(tmp_path / "small.onnx", out=tmp_path / "a", passes="quantize{}", calibrate=pictures(8, 1), **options)
    monkeypatch.setenv("CUDACXX", "no-such-nvcc")
    with pytest.raises(ToolchainError, match="no no-such-nvcc in PATH"):
        hwopt.compile(tmp_path / "small.onnx", out=tmp_path / "a", **options)
    assert not (tmp_path / "a").exists()
