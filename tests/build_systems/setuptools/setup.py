"""A package whose wheel holds a compiled model and needs hwopt only to be built: pip wheel . --no-build-isolation --no-deps"""

import shutil
import tempfile
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py

import hwopt


class BuildModel(build_py):
    """Compiles small.onnx for any processor of a kind, never for the machine at hand; the same inputs give the same bytes."""

    def run(self) -> None:
        super().run()
        with tempfile.TemporaryDirectory() as folder:
            form = hwopt.Form(("shared",))
            artifact = hwopt.compile("small.onnx", out=Path(folder) / "small", target="x86-64-v3", measure=False, form=form)
            shutil.copy(artifact.path / "libsmall.so", Path(self.build_lib) / "classifier")


class OfOnePlatform(Distribution):
    """The wheel holds machine code."""

    def has_ext_modules(self) -> bool:
        return True


setup(
    name="classifier",
    version="1.0",
    packages=["classifier"],
    distclass=OfOnePlatform,
    cmdclass={"build_py": BuildModel},
)
