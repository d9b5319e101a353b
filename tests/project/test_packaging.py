"""The package builds, and kappa_fast.kernels is found however it was installed, beside any other ``kernels``."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from kappa_fast._version import __version__

SOURCES = [
    *("kappa_fast", "kernels", "tests", "setup.py", "pyproject.toml"),
    *("MANIFEST.in", "README.md", "LICENSE", "Makefile", "constraints.txt"),
]

# A kernel of tomorrow: the room itself may be empty.
PROBE = '"""Stands in for a kernel."""\n\nANSWER = 42\n'

LOOK = """
import importlib.util, json
import kappa_fast.kernels.probe as probe
foreign = importlib.util.find_spec("kernels")
print(json.dumps({
    "answer": probe.ANSWER,
    "probe": probe.__file__,
    "foreign": foreign and foreign.origin,
    "leaks": importlib.util.find_spec("kappa_fast.kernels.layer") is not None,
}))
"""


def run(*command: object, cwd: Path, **env: str) -> None:
    """Run a command without network or input; on failure the test shows what it printed."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", **env},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}{done.stderr}"


def add_foreign_kernels(site: Path) -> Path:
    """Lay down what an installed package called kernels looks like. Returns its ``__init__.py``."""
    package = site / "kernels"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text('__version__ = "0.0.1"\n')
    (package / "layer.py").write_text("")
    metadata = site / "kernels-0.0.1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.0.1\n")
    return package / "__init__.py"


@pytest.fixture(scope="module")
def clone(root, tmp_path_factory):
    """A copy of the source tree, with a kernel in the room."""
    clone = tmp_path_factory.mktemp("clone")
    for name in SOURCES:
        if (root / name).is_dir():
            shutil.copytree(root / name, clone / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(root / name, clone / name)
    (clone / "kernels" / "probe.py").write_text(PROBE)
    return clone


@pytest.fixture(scope="module")
def built(clone, tmp_path_factory):
    """The sdist made from the clone, and the wheel made from the sdist, with torch out of reach."""
    out = tmp_path_factory.mktemp("dist")
    without_torch = tmp_path_factory.mktemp("no_torch")
    (without_torch / "torch.py").write_text("raise ImportError('a build needs no torch')\n")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, cwd=clone, PYTHONPATH=str(without_torch))
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


def wheel_install(built, clone, tmp_path):
    """Install the wheel. Returns the interpreter, where to stand, the path to search, and where packages lie."""
    site = tmp_path / "site"
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--target", site, built[1], cwd=tmp_path)
    return sys.executable, tmp_path, site, site


def sdist_install(built, clone, tmp_path):
    """The same from the sdist, which pip builds itself."""
    site = tmp_path / "site"
    options = ["--no-deps", "--no-build-isolation", "--target", site]
    run(sys.executable, "-m", "pip", "install", *options, built[0], cwd=tmp_path)
    return sys.executable, tmp_path, site, site


def editable_install(built, clone, tmp_path):
    """The same as an editable install into an environment of its own, which borrows torch from this one."""
    environment = tmp_path / "environment"
    venv.create(environment, symlinks=True)
    python = environment / "bin" / "python"
    ours = sysconfig.get_path("purelib")
    options = ["--no-deps", "--no-build-isolation", "--editable"]
    run(python, "-m", "pip", "install", *options, clone, cwd=tmp_path, PYTHONPATH=ours)
    (site,) = environment.glob("lib/python3*/site-packages")
    (site / "borrowed.pth").write_text(ours + "\n")
    return python, tmp_path, None, site


def plain_clone(built, clone, tmp_path):
    """No install: Python runs in the clone."""
    return sys.executable, clone, tmp_path / "site", tmp_path / "site"


@pytest.mark.parametrize("install", [plain_clone, editable_install, sdist_install, wheel_install])
def test_kernels_are_found_and_neither_hide_nor_take_in_a_foreign_package(install, built, clone, tmp_path, run_python):
    python, cwd, search, site = install(built, clone, tmp_path)
    env = {"PYTHONPATH": str(search)} if search else {}
    home = clone / "kernels" if install in (plain_clone, editable_install) else site / "kappa_fast" / "kernels"
    elsewhere = importlib.util.find_spec("kernels")  # whoever runs the tests may have the foreign one

    alone = json.loads(run_python(LOOK, cwd=cwd, python=python, env=env))
    assert alone == {
        "answer": 42,
        "probe": str(home / "probe.py"),
        "foreign": elsewhere and elsewhere.origin,
        "leaks": False,
    }

    foreign = add_foreign_kernels(site)
    assert json.loads(run_python(LOOK, cwd=cwd, python=python, env=env)) == {**alone, "foreign": str(foreign)}


@pytest.mark.parametrize(
    ("source_tree", "bare", "taken"), [(True, True, True), (True, False, False), (False, True, False)]
)
def test_only_a_bare_folder_of_a_source_tree_is_taken_for_the_room(source_tree, bare, taken, root, tmp_path):
    foreign = add_foreign_kernels(tmp_path)
    if bare:
        foreign.unlink()
    if source_tree:
        (tmp_path / "setup.py").touch()
    package = tmp_path / "kappa_fast" / "kernels"
    shutil.copytree(root / "kappa_fast" / "kernels", package)
    spec = importlib.util.spec_from_file_location(
        "room", package / "__init__.py", submodule_search_locations=[str(package)]
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.__path__ == [str(package), *([str(foreign.parent)] if taken else [])]


def test_transformers_works_from_the_clone_and_takes_the_room_for_no_package(clone, run_python):
    code = """
import importlib.util
from transformers import LlamaForCausalLM
from transformers.utils import is_kernels_available
is_kernels_available()
spec = importlib.util.find_spec("kernels")
print(LlamaForCausalLM.__name__, spec and spec.origin)
"""
    model, foreign = run_python(code, cwd=clone).split()
    assert model == "LlamaForCausalLM"
    assert not foreign.startswith(str(clone))


def test_the_wheel_holds_the_package_and_nothing_else(built, clone):
    with zipfile.ZipFile(built[1]) as wheel:
        names = wheel.namelist()
        metadata = wheel.read(f"kappa_fast-{__version__}.dist-info/METADATA").decode()
        scripts = wheel.read(f"kappa_fast-{__version__}.dist-info/entry_points.txt").decode()
    assert {name.split("/")[0] for name in names} == {"kappa_fast", f"kappa_fast-{__version__}.dist-info"}
    modules = {str(module.relative_to(clone)) for module in clone.glob("kappa_fast/**/*.py")}
    kernels = {f"kappa_fast/kernels/{kernel.name}" for kernel in clone.glob("kernels/*.py")}
    assert {name for name in names if name.endswith(".py")} == modules | kernels
    templates = {str(file.relative_to(clone)) for file in clone.glob("kappa_fast/report/templates/*")}
    assert len(templates) > 10
    others = {"kappa_fast/py.typed", *templates}
    assert {name for name in names if name.startswith("kappa_fast/") and not name.endswith(".py")} == others
    assert f"kappa_fast-{__version__}.dist-info/licenses/LICENSE" in names
    assert "kappa-fast = kappa_fast.cli:main" in scripts
    assert f"Version: {__version__}\n" in metadata
    assert "License-Expression: Apache-2.0\n" in metadata


def test_a_page_can_be_made_from_the_wheel(built, clone, tmp_path, run_python):
    python, cwd, site, _ = wheel_install(built, clone, tmp_path)
    code = "import kappa_fast; kappa_fast.Ranking([]).to_html('x.html'); print(kappa_fast.__file__)"
    assert run_python(code, cwd=cwd, python=python, env={"PYTHONPATH": str(site)}).startswith(str(site))
    assert (cwd / "x.html").read_text().endswith("</html>\n")


def test_the_sdist_holds_what_building_and_testing_need(built):
    with tarfile.open(built[0]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert {
        *SOURCES,
        "kernels/README.md",
        "kernels/probe.py",
        "tests/conftest.py",
        "kappa_fast/report/templates/page.html",
    } <= names
    assert not any("__pycache__" in name for name in names)


def test_the_room_for_kernels_is_flat_and_no_package_of_its_own(root):
    modules = sorted(root.glob("kernels/**/*.py"))
    assert root / "kernels" / "__init__.py" not in modules
    assert [module for module in modules if module.parent != root / "kernels"] == []
    assert not (root / "tests" / "kernels").exists()


@pytest.fixture(scope="module")
def project(root):
    return tomllib.loads((root / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def pins(root):
    lines = [line.partition("#")[0].strip() for line in (root / "constraints.txt").read_text().splitlines()]
    return [Requirement(line) for line in lines if line]


def test_every_direct_requirement_has_one_pin_that_satisfies_it(project, pins):
    wanted = itertools.chain(project["dependencies"], *project["optional-dependencies"].values())
    for requirement in map(Requirement, wanted):
        if canonicalize_name(requirement.name) == project["name"]:
            continue
        found = [next(iter(pin.specifier)) for pin in pins if pin.name == canonicalize_name(requirement.name)]
        assert [pin.operator for pin in found] == ["=="], requirement.name
        assert found[0].version in requirement.specifier, requirement.name


def test_ci_tries_the_lowest_torch_and_triton_that_the_package_admits(root, project):
    workflow = (root / ".github" / "workflows" / "ci.yml").read_text()
    for requirement in map(Requirement, project["dependencies"]):
        if requirement.name in ("torch", "triton"):
            floor = str(requirement.specifier).removeprefix(">=")
            assert re.search(rf"{requirement.name}=={re.escape(floor)}(\.0)?/", workflow), requirement


@pytest.fixture
def made(root, tmp_path):
    """A folder with the Makefile and an environment that it takes for finished. Dry runs tell what it would do."""
    for name in ("Makefile", "pyproject.toml", "setup.py", "constraints.txt"):
        shutil.copy(root / name, tmp_path / name)
        os.utime(tmp_path / name, (0, 0))
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").symlink_to(sys.executable)
    (tmp_path / ".venv" / "made-for").write_text(f"{tmp_path} python3 constraints.txt\n")
    (tmp_path / ".venv" / "has-demo").touch()
    return tmp_path


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run make as from a terminal, whatever make runs the tests."""
    outer = ("MAKE", "MFLAGS", "PYTHON", "CONSTRAINTS")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(outer)}
    return subprocess.run(["make", "-C", str(folder), *arguments], env=environment, capture_output=True, text=True)


def dry_run(folder: Path, *arguments: str) -> str:
    done = make(folder, "--dry-run", "demo", *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_make_installs_nothing_into_an_environment_that_is_up_to_date(made):
    said = dry_run(made)
    assert "kappa-fast demo" in said
    assert "pip" not in said
    assert "-m venv" not in said


def test_make_brings_the_environment_up_to_date_after_an_edit_of_the_constraints(made):
    (made / "constraints.txt").touch()
    os.utime(made / ".venv" / "has-demo", (1, 1))
    said = dry_run(made)
    assert "-e '.[demo]'" in said
    assert "-m venv" not in said


def test_make_makes_the_environment_anew_after_a_move_another_python_or_a_lost_interpreter(made, tmp_path):
    assert "-m venv --clear" in dry_run(made, "PYTHON=python3.12")
    moved = made.rename(tmp_path.with_name(tmp_path.name + "_moved"))
    assert "-m venv --clear" in dry_run(moved)
    back = moved.rename(tmp_path)
    assert "-m venv" not in dry_run(back)
    (back / ".venv" / "bin" / "python").unlink()
    assert "-m venv --clear" in dry_run(back)


def test_make_refuses_an_old_python_in_words(made):
    old = made / "old-python"
    pretend = "import sys; sys.version_info = (3, 10, 1); exec(sys.argv[1])"
    old.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{pretend}" "$2"\n')
    old.chmod(0o755)
    done = make(made, "demo", f"PYTHON={old}")
    assert done.returncode != 0
    assert f"needs Python 3.11 or newer, but {old} is 3.10" in done.stderr


def test_the_example_in_contributing_passes(root):
    (example,) = re.findall(r"^```python\n(.+?)^```", (root / "CONTRIBUTING.md").read_text(), re.DOTALL | re.MULTILINE)
    namespace: dict[str, object] = {}
    exec(example, namespace)
    (test,) = (value for name, value in namespace.items() if name.startswith("test_"))
    test()
