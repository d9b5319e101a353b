"""Compile every kernel for every target without a GPU: ``python -m kappa_fast.kernels.aot [--quick] [target ...]``.

The command prints for every instance that a launcher can request the registers, spilled bytes, shared memory, matrix
instruction and inner loop. It exits with 1 if an instance fails to compile, lacks its matrix instruction, flushes
subnormal numbers that it must keep, or has a loop that its file does not expect (narrow loads, copies that wait,
spills). Compilation runs in child processes, since a failing compiler may end its process. DECLARED lists the instances
that a target cannot compile, and their replacements.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import apply, cholesky, coarse, gram, orthogonal, panel, quantize, ritz, shifted, start, triangular
from .loops import Loop, code_of, inner_loops, whole
from .problems import TARGETS, Expected, Instance

MODULE = __spec__.name  # the name of the module, also when it runs as __main__
# Shared memory that one program may use, in bytes.
SHARED = dict.fromkeys(("sm_90", "sm_100", "sm_103"), 232448) | dict.fromkeys(("sm_89", "sm_120"), 101376)
SHARED |= {"sm_80": 166912, "gfx942": 65536}
UNITS = {
    "int8": r"wgmma\.mma_async\S*s8\.s8|mma\.sync\S*s8\.s8|tcgen05\.mma\S*kind::i8|v_mfma_i32_\w*i8",
    "float16": r"wgmma\.mma_async\S*f16\.b?f16|mma\.sync\S*f16\.b?f16|tcgen05\.mma\S*f16|v_mfma_f32_\w*b?f16",
    "tf32": r"wgmma\.mma_async\S*tf32|mma\.sync\S*tf32|tcgen05\.mma\S*tf32",
    "float64": r"mma\.sync\S*f64|wgmma\S*f64|v_mfma_f64_\w*",
}
# (kernel, target): why the target does not compile the kernel, and what runs instead.
DECLARED: dict[tuple[str, str], str] = {}


@dataclass(frozen=True)
class Report:
    """The result of one compilation. registers: per thread; spilled, shared: bytes; -1 where it is not known."""

    name: str
    target: str
    error: str = ""
    registers: int = -1
    spilled: int = -1
    shared: int = -1
    instruction: str = ""
    loop: str = ""


def instances(target: str, quick: bool) -> list[Instance]:
    """Every instance of every kernel; with ``quick`` a selection that has every value of every constant,
    and every type of every argument."""
    modules = (quantize, start, gram, cholesky, triangular, panel, apply, orthogonal, ritz, shifted, coarse)
    everything = [i for module in modules for i in module.instances(target)]
    if not quick:
        return everything
    chosen: list[Instance] = []
    rest = [instance for instance in everything if instance.constants]
    open_values = {value for instance in rest for value in _values(instance)}
    while open_values:
        # Take the instance with most new values; among equals the one with most expectations, and rows before columns.
        best = max(rest, key=lambda i: (len(_values(i) & open_values), bool(i.expected), i.constants.get("INNER") == 1))
        chosen.append(best)
        open_values -= _values(best)
    return [*chosen, *(instance for instance in everything if not instance.constants)]


def _values(instance: Instance) -> set[tuple[str, str, object]]:
    """Every constant of an instance, and the type of every argument, with the kernel that they belong to."""
    kernel = f"{instance.kernel.__module__}.{instance.kernel.__name__}"
    return {(kernel, key, value) for key, value in (*instance.constants.items(), *instance.types.items())}


def compile_one(instance: Instance, target: str, *, loops: bool = True) -> Report:
    """Compile in this process. loops: also read the loops of kernels without expectations, which takes a while."""
    names = instance.kernel.arg_names
    signature = {name: instance.types.get(name, "constexpr") for name in names}
    constants = {(k,): instance.constants.get(name) for k, name in enumerate(names) if name not in instance.types}
    # torch's arrays start on multiples of 256 bytes and slices have multiples of 128, so only 16 divides all arguments.
    hinted = [name for name, type in instance.types.items() if type.startswith("*") or name == "slice_bytes"]
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in hinted}
    where = GPUTarget("hip", target, 64) if target.startswith("gfx") else GPUTarget("cuda", int(target[3:]), 32)
    source = ASTSource(instance.kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": instance.num_warps, "num_stages": instance.num_stages}
    compiled = triton.compile(source, target=where, options=options)
    text = compiled.asm.get("ptx") or compiled.asm["amdgcn"]
    registers, spilled = _resources(compiled.asm, text)
    held = instance.expected
    loop = main_loop(code_of(compiled.asm)) if held or loops else None
    found = re.search(UNITS[instance.unit], text) if instance.unit else None
    error = ""
    if instance.unit and not found:
        error = f"no matrix instruction for {instance.unit}"
    elif compiled.metadata.shared > SHARED[target]:
        error = f"{compiled.metadata.shared} bytes of shared memory are more than {SHARED[target]}"
    elif re.search(r"\b(add|mul|fma|sub)\.\S*ftz", text):
        error = "subnormal numbers are flushed to zero"
    elif held and loop:
        error = shortfall(held, loop, registers, spilled, target)
    instruction = found.group(0) if found else ""
    return Report(
        instance.name, target, error, registers, spilled, compiled.metadata.shared, instruction, str(loop or "")
    )


def main_loop(code: str) -> Loop:
    """The inner loop with the most matrix instructions, else the most bytes; the whole kernel if it has no loop."""

    def work(loop: Loop) -> tuple[int, int]:
        return loop.matrix, sum(w * c for widths in (loop.loads, loop.copies) for w, c in widths.items())

    return max((loop for loop in inner_loops(code) if any(work(loop))), key=work, default=whole(code))


def shortfall(expected: Expected, loop: Loop, registers: int, stack: int, target: str) -> str:
    """A sentence about a compiled loop that does not meet its expectations; "" if it does."""
    nvidia = target.startswith("sm_")
    width = max([*loop.loads, *loop.copies], default=0) if loop.whole else loop.width
    if width < expected.width:
        return f"loads of {width} bytes where {expected.width} are expected: {loop}"
    if expected.ahead and nvidia and loop.pending < 1:
        return f"copies do not overlap with products: {loop}"
    if registers > expected.registers and nvidia:
        return f"{registers} registers are more than {expected.registers}"
    if stack > expected.stack:
        return f"{stack} bytes are spilled, more than {expected.stack}"
    if loop.spills > expected.spills:
        return f"the loop spills: {loop}"
    return ""


def _resources(asm: dict, text: str) -> tuple[int, int]:
    if "amdgcn" in asm:
        found = [re.search(rf"\.{key}:\s+(\d+)", text) for key in ("vgpr_count", "vgpr_spill_count")]
        return tuple(int(f.group(1)) if f else -1 for f in found)  # type: ignore[return-value]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        tool = Path(knobs.nvidia.cuobjdump.path)
        done = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=False)
    usage = re.search(r"REG:(\d+) STACK:(\d+)", done.stdout)
    return (int(usage.group(1)), int(usage.group(2))) if usage else (-1, -1)


def _child(target: str, start: int, quick: bool) -> None:
    """Compile all instances from number ``start`` on, a line of JSON before and after each."""
    for number, instance in enumerate(instances(target, quick)):
        if number < start:
            continue
        print(json.dumps({"begins": number, "name": instance.name}), flush=True)
        refusal = DECLARED.get((instance.kernel.__name__, target))
        try:
            report = Report(instance.name, target, f"declared: {refusal}")
            report = report if refusal else compile_one(instance, target, loops=not quick)
        except Exception as error:  # an error of the compiler is a result of this command
            report = Report(instance.name, target, f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}")
        print(json.dumps(asdict(report)), flush=True)


def compile_target(target: str, quick: bool = False) -> Iterator[Report]:
    """Reports for all instances, compiled in child processes that are replaced when they die."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    start = 0
    while True:
        command = [sys.executable, "-m", MODULE, "--child", target, str(start), "quick" if quick else "all"]
        child = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        begun: dict | None = None
        for line in filter(None, child.stdout.splitlines()):
            content = json.loads(line)
            if "begins" in content:
                begun = content
            else:
                yield Report(**content)
                begun = None
        if begun is None and child.returncode == 0:
            return
        if begun is None:
            yield Report("", target, f"the compiling process failed: {child.stderr.strip().splitlines()[-1:]}")
            return
        last = ["", *child.stderr.strip().splitlines()][-1]
        yield Report(begun["name"], target, f"the compiler died with {child.returncode}: {last}")
        start = begun["begins"] + 1


def main(arguments: Sequence[str]) -> int:
    """The command: 0 if everything compiled or was declared, 1 otherwise, 2 for an unknown target."""
    if arguments[:1] == ["--child"]:
        _child(arguments[1], int(arguments[2]), arguments[3] == "quick")
        return 0
    if "--jit-cache" in arguments:
        from . import jit_cache

        return jit_cache.main(arguments)
    quick = "--quick" in arguments
    targets = [argument for argument in arguments if argument != "--quick"] or list(TARGETS)
    unknown = [target for target in targets if target not in TARGETS]
    if unknown:
        print(f"unknown target {unknown[0]!r}: choose from {', '.join(TARGETS)}", file=sys.stderr)
        return 2
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        reports = [r for found in pool.map(lambda t: list(compile_target(t, quick)), targets) for r in found]
    print(f"{'target':<8} {'regs':>4} {'spill':>6} {'shared':>7}  {'kernel':<90} error, or instruction: loop")
    for r in reports:
        made = r.error or ": ".join(filter(None, (r.instruction, r.loop)))
        print(f"{r.target:<8} {r.registers:>4} {r.spilled:>6} {r.shared:>7}  {r.name:<90} {made}")
    failed = [r for r in reports if r.error and not r.error.startswith("declared: ")]
    print(f"{len(reports)} compilations, {len(failed)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
