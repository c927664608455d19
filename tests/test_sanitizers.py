"""The generated C of real models under sanitizers, with two threads in one model."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from hwopt.build import build
from hwopt.emit.products import Form
from hwopt.io.onnx import load
from hwopt.ir import Graph
from hwopt.pipeline import Context, parse
from hwopt.plugins import find_passes, find_target
from hwopt.samples import Samples, load_samples
from tests.test_build_systems import models
from tests.test_cross import DEMO, demo_images

MAIN = """
#include "{name}.h"
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
static unsigned char *wanted;
static int wrong[2];

static void *work(void *id) {{ /* the second thread: tensors that are not aligned, and a workspace of its own */
  int me = *(int *)id, shift = 4 * me;
  const hwopt_info *info = {name}_info();
  size_t in_bytes = info->inputs[0].bytes, out_bytes = info->outputs[0].bytes;
  unsigned char *in = malloc(in_bytes + (size_t)shift), *out = malloc(out_bytes + (size_t)shift);
  void *workspace = me ? aligned_alloc(64, {upper}_WORKSPACE_BYTES) : NULL;
  for (size_t i = 0; i < in_bytes / sizeof(float); ++i) ((float *)(void *)(in + shift))[i] = (float)(i % 7) / 7;
  for (int round = 0; round < {rounds}; ++round) {{
    memset(out, 0xA5, out_bytes + (size_t)shift);
    if ({name}_run((const void *)(in + shift), (void *)(out + shift), workspace) != HWOPT_OK) wrong[me]++;
    if (!wanted) memcpy(wanted = malloc(out_bytes), out + shift, out_bytes);
    wrong[me] += memcmp(wanted, out + shift, out_bytes) != 0;
  }}
  free(workspace), free(in), free(out);
  return NULL;
}}

int main(void) {{
  pthread_t thread[2];
  int id[] = {{0, 1}};
  work(&id[0]);
  for (int i = 0; i < 2; ++i) pthread_create(&thread[i], NULL, work, &id[i]);
  for (int i = 0; i < 2; ++i) pthread_join(thread[i], NULL);
  free(wanted);
  {name}_release();
  fprintf(stderr, "%d %d\\n", wrong[0], wrong[1]);
  return wrong[0] + wrong[1] ? 1 : 0;
}}
"""


def quantized(graph: Graph, samples: Samples) -> Graph:
    return parse("quantize", find_passes()).run(graph, Context(calibration=samples, target=find_target("host")))


def example(name: str, folder: Path) -> Graph:
    """The models of the example project, and the demo model."""
    if name.startswith("demo"):
        graph = load(DEMO / "fashion.onnx", shapes={"image": (1, 1, 28, 28)})
        return quantized(graph, Samples(demo_images(32))) if name == "demo_int8" else graph
    models(folder)
    graph = load(folder / f"{name}.onnx")
    return quantized(graph, load_samples(folder / "small.npz", graph)) if name == "small" else graph


@pytest.mark.slow
@pytest.mark.parametrize("name", ["small", "other", "demo", "demo_int8"])
def test_example_models_are_clean_with_two_threads_in_one_model(name: str, tmp_path: Path) -> None:
    library = build(example(name, tmp_path), find_target("host"), 2, tmp_path / name, form=Form(("source",))).library
    folder, model = library.folder, library.name
    for sanitizer in ("address,undefined", "thread"):
        (folder / "main.c").write_text(MAIN.format(name=model, upper=model.upper(), rounds=20))
        flags = ["-std=c11", "-D_GNU_SOURCE", "-g", "-O1", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", "-pthread"]
        sources = ["main.c", f"{model}.c", "hwopt_runtime.c", f"{model}_weights.S"]
        kernels = [file for file in library.files if "_kernels" in file]
        command = ["cc", *flags, "-o", "main", *sources, *kernels, "-lm"]
        made = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if "cannot find" in made.stderr:
            pytest.skip(f"this compiler has no {sanitizer} sanitizer")
        assert made.returncode == 0, made.stderr
        done = subprocess.run(["./main"], cwd=folder, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, (sanitizer, done.stderr[:3000])
