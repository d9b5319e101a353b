"""Kernels are compiled as they are launched: what a wave needs is found by running its launchers on no memory."""

import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from launches import specialized
from spectra import gaussian, trained_like

from kappa_fast.backends.triton_backend import TritonBackend
from kappa_fast.kernels import aot, jit_cache, ritz
from kappa_fast.kernels.problems import Storage, storages
from kappa_fast.spectrum import ladder
from kappa_fast.spectrum.ladder import resolve
from kappa_fast.spectrum.resolution import Goal

DIFFERENT = {"P", "TIMES", "WIDEN", "BARRIER"}  # constants that the interpreter has other values for


@pytest.mark.parametrize("storage", storages(), ids=str)
def test_stand_ins_are_of_their_storage_class(storage):
    matrix = jit_cache.stand_in(storage, (320, 128))
    assert matrix.shape == (320, 128)
    assert Storage.of(matrix) == storage


@pytest.mark.parametrize("shift", [0, 1, 8])
@pytest.mark.parametrize("turned", [False, True])
def test_a_tensor_and_its_likeness_are_compiled_for_alike(shift, turned):
    whole = torch.empty(200 * 96 + 8, dtype=torch.bfloat16)
    matrix = whole[shift : shift + 200 * 96].view(200, 96)
    found = jit_cache.like(matrix.T if turned else matrix)
    assert found.is_meta
    assert found.shape == matrix.shape
    assert Storage.of(found) == Storage.of(matrix)


def test_every_instance_is_launched_and_nothing_else():
    def key(file, kernel, constants, pointers):
        return file, kernel, frozenset((name, value) for name, value in constants if name not in DIFFERENT), pointers

    with specialized() as launched:  # the second shape is cut along its rows
        jit_cache.launch_all(
            [jit_cache.stand_in(storage, s) for storage in storages() for s in [(320, 320), (20000, 64)]]
        )
    wanted = {
        key(
            i.kernel.fn.__module__,
            i.kernel.__name__,
            [(name, str(value)) for name, value in i.constants.items()],
            frozenset((name, type) for name, type in i.types.items() if type.startswith("*")),
        )
        for i in aot.instances("sm_90", quick=False)
    }
    found = {key(one.file, one.kernel, one.constants, _pointers(one.types)) for one in launched}
    assert found == wanted


def _pointers(types):
    """Those of the tensors among the arguments, as Triton writes them."""
    dtypes = {name: type.split(",")[0].removeprefix("torch.") for name, type in types if type.startswith("torch.")}
    return frozenset(
        (name, "*" + re.sub("^float|^int", lambda m: m[0][0].replace("f", "fp"), d)) for name, d in dtypes.items()
    )


@pytest.mark.slow
def test_nothing_that_rank_launches_is_left_out(monkeypatch):
    monkeypatch.setattr(ladder, "EXACT_BELOW", 32)
    monkeypatch.setattr(ritz, "SECTIONS", 5)
    wave = [trained_like(96, 32, 1).bfloat16(), gaussian(51, 35, 2).half()]
    with specialized() as launched:
        resolve(TritonBackend(torch.device("cpu")), wave, Goal(5e-2, certify=True))
    with specialized() as listed:
        jit_cache.launch_all([jit_cache.like(a) for a in wave])
    assert len(launched) > 30
    assert launched <= listed


FILL = """
import sys, torch
from pathlib import Path
from kappa_fast.kernels import jit_cache, quantize

def launch_few(matrices):
    meta = matrices[0].device
    quantize.sum_runs(*(torch.empty(5, dtype=t, device=meta) for t in (torch.int32, torch.int32, torch.float64)))

jit_cache.launch_all = launch_few  # one small kernel stands for all
done = jit_cache.fill(Path(sys.argv[1]), "sm_90", [torch.bfloat16], 1)
assert not done.failed
print(len(done.compiled), len(done.found))
"""


@pytest.fixture
def filled(root, tmp_path):
    """Fill a cache in a process of its own: ``filled(cache)`` returns (compiled, found)."""

    def fill(cache, at=root):
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        command = [sys.executable, "-c", FILL, str(cache)]
        done = subprocess.run(
            command, cwd=at, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr
        return tuple(int(word) for word in done.stdout.split())

    return fill


@pytest.mark.slow
def test_what_one_process_compiled_the_next_one_finds_wherever_it_is_unpacked(filled, tmp_path):
    made, moved, archive = tmp_path / "made", tmp_path / "moved", tmp_path / "cache.tar.xz"
    assert filled(made) == (1, 0)
    assert filled(made) == (0, 1)
    assert jit_cache.pack(made, archive, "sm_90") == 1
    shutil.rmtree(made)
    assert jit_cache.unpack(archive, moved) == []
    assert filled(moved) == (0, 1)


@pytest.mark.slow
def test_kernels_that_changed_are_compiled_again(filled, root, tmp_path):
    cache, clone = tmp_path / "cache", tmp_path / "clone"
    for folder in ("kappa_fast", "kernels"):
        shutil.copytree(root / folder, clone / folder)
    (clone / "setup.py").touch()  # a source tree: see kappa_fast/kernels/__init__.py
    assert filled(cache) == (1, 0)
    assert filled(cache, clone) == (0, 1)
    file = clone / "kernels" / "quantize.py"
    file.write_text(
        file.read_text().replace(
            "total = tl.zeros((BLOCK,), tl.float64)", "total = tl.zeros((BLOCK,), tl.float64) + 0.0"
        )
    )
    assert filled(cache, clone) == (1, 0)


BROKEN = """
import sys, torch, triton
import triton.language as tl
from pathlib import Path
from kappa_fast.kernels import jit_cache, quantize
from kappa_fast.kernels.launch import launch

@triton.jit
def broken(x):
    tl.store(x, tl.no_such_thing(x))

def launch_few(matrices):
    meta = matrices[0].device
    launch(broken, (1,), torch.empty(5, device=meta))
    quantize.sum_runs(*(torch.empty(5, dtype=t, device=meta) for t in (torch.int32, torch.int32, torch.float64)))

seen = []
jit_cache.launch_all = launch_few
jit_cache.driver.set_active(jit_cache.Pretended("sm_80"))
done = jit_cache.compile_all([[torch.empty(5, device="meta")]], 2, lambda *counts: seen.append(counts))
assert len(seen) == 2 and max(seen) == (2, 2), seen
print(len(done.compiled) + len(done.found), *(str(error) for error in done.failed))
"""


@pytest.mark.slow
def test_a_kernel_that_does_not_compile_stops_no_other(root, tmp_path):
    (tmp_path / "broken.py").write_text(BROKEN)  # Triton reads the source of a kernel
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(root), "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, str(tmp_path / "broken.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1 ")
    assert "no_such_thing" in done.stdout


@pytest.mark.parametrize("key", ["triton", "build", "python"])
def test_an_archive_of_another_triton_or_python_says_that_it_will_not_be_used(key, tmp_path, monkeypatch):
    kernel = tmp_path / "made" / "ABC"
    kernel.mkdir(parents=True)
    (kernel / "__grp__sum.json").write_text('{"child_paths": {}}')
    (kernel / "sum.json").write_text("{}")
    (kernel / "sum.cubin").write_bytes(b"code")
    (kernel / "sum.ttir").write_text("for people")
    here = jit_cache.identity()
    monkeypatch.setattr(jit_cache, "identity", lambda: {**here, key: "another"})
    assert jit_cache.pack(tmp_path / "made", tmp_path / "archive", "sm_90") == 1
    monkeypatch.setattr(jit_cache, "identity", lambda: here)
    assert jit_cache.unpack(tmp_path / "archive", tmp_path / "here") == [
        f"made with {key} another, here is {here[key]}"
    ]
    group = json.loads((tmp_path / "here" / "ABC" / "__grp__sum.json").read_text())
    assert group["child_paths"] == {name: str(tmp_path / "here" / "ABC" / name) for name in ("sum.cubin", "sum.json")}


def test_a_dtype_that_is_unknown_is_named(capsys):
    with pytest.raises(SystemExit):
        aot.main(["--jit-cache", "nowhere", "--dtypes", "bfloat16,float65", "sm_90"])
    assert "unknown dtypes float65: choose from float32" in capsys.readouterr().err


def test_no_two_kernels_share_a_name_since_profilers_know_nothing_else():
    kernels = {(i.kernel.fn.__module__, i.kernel.__name__) for i in aot.instances("sm_90", quick=False)}
    names = [name for _, name in kernels]
    assert sorted(names) == sorted(set(names))


def test_warming_up_takes_one_matrix_of_each_storage_class_and_none_that_kernels_do_not_read():
    weights = [torch.empty(64, 48), torch.empty(320, 128), torch.empty(33, 20).bfloat16(), torch.empty(9, 9).double()]
    found = jit_cache.representatives([*weights, torch.empty(0, 16), torch.empty(48, 64, dtype=torch.float16).T])
    assert sorted((tuple(a.shape), a.dtype) for a in found) == [
        ((33, 20), torch.bfloat16),
        ((64, 48), torch.float16),
        ((320, 128), torch.float32),
    ]
    assert all(a.is_meta for a in found)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_warming_up_without_a_gpu_says_so():
    from kappa_fast.kernels import warmup

    with pytest.raises(RuntimeError, match="compiled for a GPU that torch can use, and torch finds none"):
        warmup([torch.zeros(20, 20)])


def test_a_module_is_warmed_up_by_its_matrices_stacks_and_convolutions(monkeypatch):
    seen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(jit_cache, "compile_all", lambda waves, workers, progress: seen.extend(waves))
    module = torch.nn.ModuleDict({"a": torch.nn.Linear(48, 64), "c": torch.nn.Conv2d(3, 17, 3)})
    module.experts = torch.nn.Parameter(torch.zeros(4, 40, 30))
    jit_cache.warmup(module)
    assert sorted(tuple(a.shape) for a in seen[0]) == [(27, 17), (40, 30), (64, 48)]


@pytest.mark.slow
def test_the_keys_of_kernels_depend_on_no_order_in_which_threads_use_them():
    """Of interpreted kernels there are no keys, so this takes processes of its own."""
    script = (
        "import random, sys, threading\n"
        "from kappa_fast.kernels import apply, cholesky, coarse, gram, panel, quantize, ritz, start, triangular\n"
        "from kappa_fast.kernels.launch import settle\n"
        "modules = (apply, cholesky, coarse, gram, panel, quantize, ritz, start, triangular)\n"
        "kernels = [getattr(m, name) for m in modules for name in sorted(vars(m)) if name.endswith('_kernel')]\n"
        "def use():\n"
        "    for kernel in random.Random(int(sys.argv[1])).sample(kernels, len(kernels)):\n"
        "        together.wait()\n"
        "        settle(kernel)\n"
        "        kernel.cache_key\n"
        "sys.setswitchinterval(1e-6)\n"
        "together = threading.Barrier(4)\n"
        "threads = [threading.Thread(target=use) for _ in range(4)]\n"
        "[thread.start() for thread in threads]\n"
        "[thread.join() for thread in threads]\n"
        "print(len(kernels), *(kernel.cache_key for kernel in kernels))\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    found = {
        subprocess.run(
            [sys.executable, "-c", script, seed], env=environment, capture_output=True, text=True, check=True
        ).stdout
        for seed in "123"
    }
    assert len(found) == 1
    assert int(found.pop().split()[0]) >= 25
