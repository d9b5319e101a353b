"""What the compiler made of a kernel: the loops of its machine code, and what each of them does in one turn.

Read off the disassembly that NVIDIA's own tool prints (``cuobjdump -sass``; Triton brings it along): a loop is a jump
backwards, and an inner loop is one that holds no other. aot.py holds the kernels to what they are meant to look like.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from triton import knobs

_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")
_MATRIX = re.compile(r"(HMMA|IMMA|DMMA|QMMA|OMMA|HGMMA|IGMMA|QGMMA|UTC\w*MMA)")
_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}


@dataclass(frozen=True)
class Loop:
    """One turn of a loop of machine code.

    loads, copies: bytes per thread and instruction of what is read from memory into registers, and asynchronously into
    shared memory: how many of each width.  pending: copies that may be under way while the loop computes, in groups; 0
    if every copy is waited for, -1 if there are none.  spills: accesses to local memory.
    """

    instructions: int
    loads: dict[int, int]
    copies: dict[int, int]
    pending: int
    matrix: int
    float64: int
    shuffles: int
    barriers: int
    spills: int

    def __str__(self) -> str:
        parts = [f"{self.instructions} instructions"]
        for name, widths in (("loads", self.loads), ("copies", self.copies)):
            parts += [f"{count} {name} of {width}" for width, count in sorted(widths.items())]
        parts += [f"{self.pending} pending"] if self.copies else []
        for name in ("matrix", "float64", "shuffles", "barriers", "spills"):
            count = getattr(self, name)
            parts += [f"{count} {name}"] if count else []
        return ", ".join(parts)


def disassembled(cubin: bytes) -> str:
    """The machine code of a kernel as text."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = Path(knobs.nvidia.cuobjdump.path)
        return subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout


def inner_loops(text: str) -> list[Loop]:
    """The loops of a disassembly that hold no other loop, in the order in which they lie."""
    lines = [(int(m[1], 16), m[2], m[3]) for m in _LINE.finditer(text)]
    spans = set()
    for address, opcode, operands in lines:
        target = re.search(r"\b0x([0-9a-f]+)\s*$", operands.strip())
        if opcode.split(".")[0] == "BRA" and target and int(target[1], 16) < address:
            spans.add((int(target[1], 16), address))
    inner = [s for s in spans if not any(t != s and s[0] <= t[0] and t[1] <= s[1] for t in spans)]
    return [_loop([line for line in lines if first <= line[0] <= last]) for first, last in sorted(inner)]


def _loop(lines: list[tuple[int, str, str]]) -> Loop:
    loads, copies, names = Counter[int](), Counter[int](), Counter[str]()
    depths = []
    for _, opcode, operands in lines:
        name, *modifiers = opcode.split(".")
        width = next((_WIDTHS[m] for m in modifiers if m in _WIDTHS), 4)
        loads[width] += name == "LDG"
        copies[width] += name == "LDGSTS"
        names[name] += 1
        names["matrix"] += bool(_MATRIX.match(name))
        waited = re.search(r"SB0, 0x([0-9a-f]+)", operands)
        if name == "DEPBAR" and waited:
            depths.append(int(waited[1], 16))
    return Loop(
        len(lines),
        {k: v for k, v in loads.items() if v},
        {k: v for k, v in copies.items() if v},
        (min(depths) if depths else 0) if sum(copies.values()) else -1,
        names["matrix"],
        sum(names[n] for n in ("DFMA", "DADD", "DMUL")),
        names["SHFL"],
        names["BAR"],
        names["LDL"] + names["STL"],
    )
