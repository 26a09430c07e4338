"""Put workflows/ into the wheel as qlib_ext/workflows; all else: pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithWorkflows(build_py):
    """Copies them; an editable install reads them where they are."""

    def run(self):
        """Build, then copy."""
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "qlib_ext" / "workflows"
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree("workflows", target)


setup(cmdclass={"build_py": BuildWithWorkflows})
