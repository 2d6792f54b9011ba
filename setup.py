"""Settings are in pyproject.toml; this puts the examples into the package when a wheel is built."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent


class BuildWithExamples(build_py):
    """``examples/NAME`` of the repository becomes ``edadm_compile/examples/NAME`` of the wheel."""

    def run(self) -> None:
        """Copy the package, then the examples; an editable installation reads those of the checkout."""
        super().run()
        if self.editable_mode:
            return
        goal = Path(self.build_lib) / "edadm_compile" / "examples"
        left_out = shutil.ignore_patterns("__pycache__", "*.pyc", "cifar10")  # 13 MB of weights stay in the repository
        shutil.copytree(HERE / "examples", goal, dirs_exist_ok=True, ignore=left_out)


setup(cmdclass={"build_py": BuildWithExamples})
