"""The loops in the machine code of a compiled kernel, and the instructions of one turn of each, for aot.py.

They are read from the disassembly of NVIDIA's tool (which Triton includes), from PTX if that tool does not know the
target, and from AMD's assembly. A loop is a jump backwards; an inner loop contains no other loop.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from triton import knobs


@dataclass(frozen=True)
class Loop:
    """One turn of a loop.

    loads, copies: how many instructions of each width (bytes per thread) read memory into registers, and into shared
    memory without waiting.  pending: how many groups of copies may be under way while the loop computes, 0 if it
    waits for all of them, -1 if there are none.  spills: accesses to local memory.
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
    whole: bool = False  # not a loop but all of the kernel

    @property
    def width(self) -> int:
        """Bytes of the narrowest load or copy; 0 if there is none."""
        return min([*self.loads, *self.copies], default=0)

    def __str__(self) -> str:
        parts = [f"{self.instructions} instructions"]
        for name, widths in (("loads", self.loads), ("copies", self.copies)):
            parts += [f"{count} {name} of {width}" for width, count in sorted(widths.items())]
        parts += [f"{self.pending} pending"] if self.copies else []
        for name in ("matrix", "float64", "shuffles", "barriers", "spills"):
            count = getattr(self, name)
            parts += [f"{count} {name}"] if count else []
        return ", ".join(parts)


# kind, operation, operands and where it jumps to; or the name of a label.
_SASS = re.compile(r"/\*(?P<label>[0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?(?P<operation>[A-Z][\w.]*)(?P<operands>[^;]*);")
_TEXT = re.compile(
    r"^\s*(?:(?P<label>[$.]\w+):|(?:@!?%\w+\s+)?(?P<operation>[a-z][\w.:]*)(?P<operands>[^\n]*))", re.MULTILINE
)
_KINDS = {
    "loads": r"LDG\b|ld\.global|(?:global|buffer|flat)_load",
    "copies": r"LDGSTS|cp\.async\.c[ag]",
    "waits": r"DEPBAR|cp\.async\.wait_group",
    "matrix": r"(?:[HIDQ]G?MMA|OMMA|UTC\w*MMA)|wgmma\.mma|mma\.sync|tcgen05\.mma|v_mfma",
    "float64": r"D(?:FMA|ADD|MUL)\b|(?:fma|add|mul|sub)\.(?:rn\.)?f64|v_(?:fma|add|mul)_f64",
    "shuffles": r"SHFL|shfl|ds_(?:bpermute|swizzle)",
    "barriers": r"BAR\b|bar\.sync|s_barrier",
    "spills": r"(?:LDL|STL)\b|(?:ld|st)\.local|scratch_(?:load|store)",
    "jumps": r"BRA\b|bra\b|s_c?branch",
}
_KIND = {kind: re.compile(pattern) for kind, pattern in _KINDS.items()}
_SASS_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
_AMD_WIDTHS = {"ubyte": 1, "sbyte": 1, "ushort": 2, "sshort": 2, "short": 2, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}


@dataclass(frozen=True)
class _Line:
    kind: str
    operation: str
    operands: str


def code_of(asm: Mapping[str, object]) -> str:
    """The text of a compiled kernel: its machine code if that can be disassembled, else the assembly."""
    if "cubin" not in asm:
        return str(asm["amdgcn"])
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        command = [Path(knobs.nvidia.cuobjdump.path), "-sass", file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    known = done.returncode == 0 and _SASS.search(done.stdout)
    return done.stdout if known else str(asm["ptx"])


def inner_loops(code: str) -> list[Loop]:
    """The loops that hold no other loop, in the order in which they lie."""
    lines, labels = _read(code)
    spans = set()
    for place, line in enumerate(lines):
        target = re.search(r"([$.]\w+|0x[0-9a-f]+)\W*$", line.operands) if line.kind == "jumps" else None
        start = labels.get(target[1].removeprefix("0x").zfill(4)) if target else None
        if start is not None and start < place:
            spans.add((start, place))
    inner = [s for s in spans if not any(t != s and s[0] <= t[0] and t[1] <= s[1] for t in spans)]
    return [_loop(lines[first : last + 1]) for first, last in sorted(inner)]


def whole(code: str) -> Loop:
    """A kernel without loops, as if it were one turn of a loop."""
    return replace(_loop(_read(code)[0]), whole=True)


def _read(code: str) -> tuple[list[_Line], dict[str, int]]:
    lines: list[_Line] = []
    labels: dict[str, int] = {}
    for match in _lines(code):
        if match["label"]:
            labels[match["label"]] = len(lines)
        if match["operation"]:
            kind = next((kind for kind, pattern in _KIND.items() if pattern.match(match["operation"])), "")
            lines.append(_Line(kind, match["operation"], match["operands"]))
    return lines, labels


def _lines(code: str) -> Iterator[re.Match[str]]:
    return (_SASS if _SASS.search(code) else _TEXT).finditer(code)


def _loop(lines: list[_Line]) -> Loop:
    count = Counter(line.kind for line in lines)
    widths = {kind: Counter(_width(line) for line in lines if line.kind == kind) for kind in ("loads", "copies")}
    depths = [int(found[1], 0) for line in lines if line.kind == "waits" and (found := _depth(line))]
    return Loop(
        instructions=len(lines),
        loads=dict(widths["loads"]),
        copies=dict(widths["copies"]),
        pending=min(depths, default=0) if count["copies"] else -1,
        **{kind: count[kind] for kind in ("matrix", "float64", "shuffles", "barriers", "spills")},
    )


def _depth(line: _Line) -> re.Match[str] | None:
    """The number of groups that a wait leaves under way."""
    return re.search(r"SB0, (0x[0-9a-f]+)|^\s*(\d+)" if line.operation.isupper() else r"^\s*(\w+)", line.operands)


def _width(line: _Line) -> int:
    """Bytes per thread."""
    operation = line.operation
    if line.kind == "copies" and operation[0].islower():
        return int(line.operands.split(",")[2].strip(" ;"), 0)
    if operation.startswith("ld.global"):
        vector, bits = re.search(r"\.v(\d)", operation), re.search(r"\.[bufs](\d+)$", operation)
        return (int(vector[1]) if vector else 1) * int(bits[1]) // 8 if bits else 4
    if operation.islower():
        return _AMD_WIDTHS.get(operation.split("_")[2], 4)
    return next((_SASS_WIDTHS[part] for part in operation.split(".") if part in _SASS_WIDTHS), 4)
