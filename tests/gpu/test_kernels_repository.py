"""kernels/ is complete in itself: it loads as a kernel repository does, under another name and without kappa_fast."""

import ast
import importlib.util
import json
import os
import subprocess
import sys

import pytest

from kappa_fast.kernels import repository

# What the kernels package does with a folder of a local repository (kernels 0.17, importer.py).
BY_ITS_RULES = """
import importlib.util, json, sys
from pathlib import Path

def load(folder):
    variant = Path(folder) / "build" / "torch-cpu"
    name = json.loads((variant / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
"""
BY_THE_PACKAGE = """
import sys
from pathlib import Path
from kernels import get_local_kernel

def load(folder):
    return get_local_kernel(Path(folder), backend="cpu")
"""
USE = """
sys.modules["kappa_fast"] = None  # importing it fails
import torch

kernels = load(sys.argv[1])
a = torch.randn(48, 32, generator=torch.Generator().manual_seed(1))
problems = kernels.problems.Problems.of([a])
slices = kernels.quantize.quantize(problems, kernels.quantize.column_peaks(problems), 2)
(found,) = problems.gram_views(kernels.gram.gram_of_slices(problems, slices))
exact = a.double().T @ a.double()
assert (torch.tril(found - exact).abs().max() < 1e-2 * exact.abs().max())
print(*kernels.__all__)
"""


def used(loader, folder):
    repository.lay_out(folder, ["cpu"])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    command = [sys.executable, "-W", "error", "-c", loader + USE, str(folder)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_a_copy_works_on_its_own(tmp_path):
    assert used(BY_ITS_RULES, tmp_path) == list(repository.FAMILIES)


# The folder of the clone has no origin, the package has one.
@pytest.mark.skipif(
    not getattr(importlib.util.find_spec("kernels"), "origin", None), reason="needs the package kernels"
)
def test_the_kernels_package_loads_a_copy(tmp_path):
    assert used(BY_THE_PACKAGE, tmp_path) == list(repository.FAMILIES)


def test_every_backend_has_a_folder_and_a_name_of_its_own(tmp_path):
    made = repository.lay_out(tmp_path)
    described = [json.loads((variant / "metadata.json").read_text()) for variant in made]
    assert [variant.name for variant in made] == ["torch-cuda", "torch-rocm"]
    assert [d["backend"] for d in described] == [{"type": "cuda"}, {"type": "rocm"}]
    assert len({d["id"] for d in described}) == 2
    assert all(d["id"].isidentifier() for d in described)
    (tmp_path / "build" / "torch-cuda" / "stale.py").touch()
    repository.lay_out(tmp_path)
    assert not (tmp_path / "build" / "torch-cuda" / "stale.py").exists()


def test_the_command_says_what_it_wrote(tmp_path, capsys):
    assert repository.main([str(tmp_path)]) == 0
    assert "torch-rocm" in capsys.readouterr().out
    assert repository.main([]) == 2
    assert "usage" in capsys.readouterr().err


def test_kernels_import_nothing_but_torch_triton_and_the_standard_library(root):
    for file in (root / "kernels").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level <= 1, file
                names = [node.module] if not node.level else []
            for name in names:
                first = name.split(".")[0]
                assert first in {"torch", "triton"} or first in sys.stdlib_module_names, (file, name)
