"""hwopt as a library: inside of another project's setuptools build, typed, with a reference made of its docstrings."""

from __future__ import annotations

import inspect
import pydoc
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

import hwopt
from hwopt.backends.ort import Session
from hwopt.emit.cpu import host_machine
from hwopt.io.onnx import load
from tests.test_build_systems import EXAMPLES, call, models

SHOW = """
import sys
sys.path.insert(0, sys.argv[1])
from classifier import classify
assert not {"hwopt", "tvm", "numpy"} & set(sys.modules)
print(*classify([i % 7 / 7 for i in range(192)]))
"""


@pytest.mark.slow
@pytest.mark.skipif(host_machine() != "x86_64", reason="the example states x86-64-v3")
def test_a_wheel_holds_a_model_that_setuptools_had_compiled(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", "77")
    project = tmp_path / "project"
    shutil.copytree(EXAMPLES / "setuptools", project)
    models(project)
    call(sys.executable, "setup.py", "-q", "bdist_wheel", folder=project)
    (wheel,) = (project / "dist").glob("classifier-1.0-*.whl")
    assert not wheel.stem.endswith("any")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", SHOW, str(tmp_path / "installed")], capture_output=True, text=True, check=True
    )
    image = (np.arange(192, dtype=np.float32) % 7 / 7).reshape(1, 3, 8, 8)
    wanted = Session(load(project / "small.onnx")).run({"image": image})["classes"]
    np.testing.assert_allclose([[float(word) for word in done.stdout.split()]], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", hwopt.__all__)
def test_every_public_name_has_a_reference(name: str) -> None:
    """`python -m pydoc hwopt.compile` shows it; the package's own page lists it."""
    value = getattr(hwopt, name)
    text = pydoc.plain(pydoc.render_doc(f"hwopt.{name}"))
    assert inspect.getdoc(value) and str(inspect.getdoc(value)).splitlines()[0][:40] in text
    assert f"\n{name} " in str(hwopt.__doc__)


def test_the_package_is_typed() -> None:
    assert Path(hwopt.__file__).with_name("py.typed").exists()
    for name in ("compile", "load"):
        assert inspect.signature(getattr(hwopt, name)).return_annotation is not inspect.Signature.empty
