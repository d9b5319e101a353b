"""The one build step that pyproject.toml cannot say: the files of kernels/ become modules of kappa_fast.kernels."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithKernels(build_py):
    """``build_py`` that knows where the modules of kappa_fast.kernels are."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        """List the modules of one package as (package, module, file): what is built, shipped and mapped."""
        modules: list[tuple[str, str, str]] = super().find_package_modules(package, package_dir)
        if package == "kappa_fast.kernels":
            files = sorted(Path("kernels").glob("*.py"))
            modules += [(package, file.stem, str(file)) for file in files]
        return modules


setup(cmdclass={"build_py": BuildWithKernels})
