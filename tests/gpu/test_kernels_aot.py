"""Every kernel compiles for every target, with the matrix instructions it is meant to use."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest

from kappa_fast.kernels import aot
from kappa_fast.kernels.loops import Loop
from kappa_fast.kernels.problems import TARGETS, Expected


def compile_in_children(root, *arguments):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "kappa_fast.kernels.aot", *arguments]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=1800, check=False)


IN_CI = ("sm_90",)  # the others take as long again


@pytest.mark.parametrize(
    "target", [pytest.param(t, marks=pytest.mark.long if t in IN_CI else pytest.mark.slow) for t in TARGETS]
)
def test_every_kernel_compiles_with_every_value_of_its_constants(target, root):
    done = compile_in_children(root, "--quick", target)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith(target)]
    assert len(lines) == len(aot.instances(target, quick=True)) > 20
    products = [line for line in lines if "slices[LOW=" in line and "SIDE=" in line]
    unit = {"sm_90": "wgmma", "gfx942": "v_mfma_i32"}.get(target, "mma.sync")
    assert len(products) == 5
    assert all(unit in line and "i8" in line.replace("s8", "i8") for line in products)


POINTER = "field(table, matrix, POINTER).to(tl.pointer_type(ELEMENT))"
# A hint, what is left without it, and an instance that needs it.
HINTS = [
    ("problems.py", f"tl.multiple_of({POINTER}, BASE)", POINTER, "weights"),
    ("problems.py", "ROW_STRIDE, WIDE)", "ROW_STRIDE)", "weights"),
    ("problems.py", "COLUMNS, WIDE)", "COLUMNS)", "weights"),
    ("problems.py", "ROW_STRIDE, WIDE)", "ROW_STRIDE)", "times"),
    ("problems.py", "ROW_STRIDE, WIDE)", "ROW_STRIDE)", "transposed"),
    ("problems.py", "ROW_STRIDE, WIDE)", "ROW_STRIDE)", "peaks"),
    ("problems.py", "ROW_STRIDE, WIDE)", "ROW_STRIDE)", "digits[LOW=1,HIGH=2,BITS"),
    ("gram.py", "PITCH, PAD)", "PITCH)", "slices[LOW=1,HIGH=2,SIDE"),
    ("gram.py", "SLICE, PAD)", "SLICE)", "slices[LOW=1,HIGH=2,SIDE"),
    ("coarse.py", "PITCH, PAD).to", "PITCH).to", "rest[SIDE"),
]
COMPILE = """
import json, sys
from copied import aot

found = [i for i in aot.instances("sm_90", False) if sys.argv[1] in i.name.replace("ELEMENT=bf16", "ELEMENT=*")]
chosen, *_ = [i for i in found if i.expected and i.constants.get("INNER", 1) == 1 and "=fp" not in i.name
             and not i.constants.get("FLOAT8") and not i.constants.get("BINADES") and i.constants.get("BITS") != 8]
print(json.dumps(aot.compile_one(chosen, "sm_90").error))
"""


def complaint_without(root, tmp_path, file, hint, plain, name):
    """What the gate says of an instance when a hint is taken out of a copy of the kernels."""
    copied = tmp_path / "copied"
    shutil.copytree(root / "kernels", copied, ignore=shutil.ignore_patterns("__pycache__"))
    text = (copied / file).read_text()
    assert hint in text
    (copied / file).write_text(text.replace(hint, plain))
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE, name]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("file", "hint", "plain", "name"), [HINTS[0], *(pytest.param(*hint, marks=pytest.mark.slow) for hint in HINTS[1:])]
)
def test_a_hint_that_stops_working_fails(file, hint, plain, name, root, tmp_path):
    complaint = complaint_without(root, tmp_path, file, hint, plain, name)
    assert re.match(r"loads of \d bytes where (8|16) are expected", complaint)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({name for *_, name in HINTS}))
def test_with_its_hints_nothing_fails(name, root, tmp_path):
    assert complaint_without(root, tmp_path, "problems.py", POINTER, POINTER, name) == ""


LOOP = Loop(100, loads={}, copies={16: 8}, pending=2, matrix=4, float64=0, shuffles=0, barriers=2, spills=0)


@pytest.mark.parametrize(
    ("loop", "registers", "stack", "complaint"),
    [
        (LOOP, 200, 0, ""),
        (replace(LOOP, loads={2: 64}), 200, 0, "loads of 2 bytes where 16 are expected"),
        (replace(LOOP, copies={}, pending=-1), 200, 0, "loads of 0 bytes where 16 are expected"),
        (replace(LOOP, pending=0), 200, 0, "copies do not overlap with products"),
        (replace(LOOP, spills=3), 200, 0, "the loop spills"),
        (LOOP, 201, 0, "201 registers are more than 200"),
        (LOOP, 200, 8, "8 bytes are spilled, more than 0"),
        (replace(LOOP, loads={8: 5}, whole=True), 200, 0, ""),
    ],
)
def test_a_loop_is_held_to_what_is_expected(loop, registers, stack, complaint):
    expected = Expected(width=16, ahead=True, registers=200)
    found = aot.shortfall(expected, loop, registers, stack, "sm_90")
    assert found.startswith(complaint)
    assert bool(found) == bool(complaint)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_every_combination_compiles(target, root):
    done = compile_in_children(root, target)
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_size_that_may_be_one_becomes_a_constant_of_the_compilation():
    # Triton turns an integer argument of 1 into a constant, which has none of the methods of a tensor.
    for instance in aot.instances("sm_90", quick=True):
        plain = instance.kernel.kwargs.get("do_not_specialize") or []
        sizes = [name for name, type in instance.types.items() if not type.startswith("*") and name != "slice_bytes"]
        assert set(sizes) <= set(plain), instance.name


def test_a_target_that_is_none_is_named(root):
    done = compile_in_children(root, "sm_42")
    assert done.returncode == 2
    assert "unknown target 'sm_42': choose from sm_80" in done.stderr


def test_the_quick_selection_has_every_value_of_every_constant_and_every_type():
    def values(instances):
        return {
            (i.kernel.__module__, i.kernel.__name__, *pair)
            for i in instances
            for pair in (*i.constants.items(), *i.types.items())
        }

    for target in TARGETS:
        everything, quick = aot.instances(target, quick=False), aot.instances(target, quick=True)
        assert values(quick) == values(everything)
        assert len(quick) < len(everything) / 4


def script(tmp_path, monkeypatch, body):
    """Children that run this instead of the compiler."""
    path = tmp_path / "child.py"
    path.write_text("import json, os, sys\ntarget, start = sys.argv[2], int(sys.argv[3])\n" + body)
    real = subprocess.run
    monkeypatch.setattr(
        aot.subprocess,
        "run",
        lambda command, **options: real([sys.executable, str(path), *command[3:]], **options),
    )


def test_a_compiler_that_dies_is_reported_and_the_others_go_on(tmp_path, monkeypatch):
    script(
        tmp_path,
        monkeypatch,
        """
for number in range(start, 3):
    print(json.dumps({"begins": number, "name": f"kernel{number}"}), flush=True)
    if number == 1:
        print("LLVM ERROR: no such thing", file=sys.stderr, flush=True)
        os.abort()
    print(json.dumps({"name": f"kernel{number}", "target": target}), flush=True)
""",
    )
    reports = list(aot.compile_target("sm_90"))
    assert [r.name for r in reports] == ["kernel0", "kernel1", "kernel2"]
    assert [bool(r.error) for r in reports] == [False, True, False]
    assert "LLVM ERROR: no such thing" in reports[1].error


def test_children_that_cannot_start_are_reported(tmp_path, monkeypatch, capsys):
    script(tmp_path, monkeypatch, "sys.exit('no triton here')\n")
    assert aot.main(["sm_90"]) == 1
    assert "no triton here" in capsys.readouterr().out


def test_a_declared_refusal_is_no_failure_and_is_shown(monkeypatch, capsys):
    report = aot.Report("gram", "sm_90")
    found = [replace(report, error="declared: crashes, torch does it"), report]
    monkeypatch.setattr(aot, "compile_target", lambda target, quick: found)
    assert aot.main(["sm_90"]) == 0
    assert "crashes, torch does it" in capsys.readouterr().out
    monkeypatch.setattr(aot, "compile_target", lambda target, quick: [replace(report, error="spills")])
    assert aot.main(["sm_90"]) == 1
