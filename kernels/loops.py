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


# What precedes the operation is the name of a label, or the predicate that decides whether it is executed.
_SASS = re.compile(
    r"/\*(?P<label>[0-9a-f]{4,})\*/\s+(?P<predicate>@!?U?P\w+\s+)?(?P<operation>[A-Z][\w.]*)(?P<operands>[^;?&\n]*)"
)
_TEXT = re.compile(
    r"^\s*(?:(?P<label>[$.]\w+):|(?P<predicate>@!?%\w+\s+)?(?P<operation>[a-z][\w.:]*)(?P<operands>[^\n]*))",
    re.MULTILINE,
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
    "ends": r"EXIT\b|RET\b|ret\b|exit\b|s_endpgm|s_setpc",
}
_KIND = {kind: re.compile(pattern) for kind, pattern in _KINDS.items()}
_SASS_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
_AMD_WIDTHS = {"ubyte": 1, "sbyte": 1, "ushort": 2, "sshort": 2, "short": 2, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}


@dataclass(frozen=True)
class _Line:
    kind: str
    operation: str
    operands: str
    certain: bool  # not under a predicate

    @property
    def target(self) -> str:
        """The label that a jump names, "" if there is none."""
        found = re.search(r"([$.]\w+|0x[0-9a-f]+)\W*$", self.operands) if self.kind == "jumps" else None
        return found[1].removeprefix("0x").zfill(4) if found else ""

    @property
    def goes_on(self) -> bool:
        """Whether the next line may follow."""
        if self.kind == "jumps":
            # Two operands are a predicate and a target; AMD and PTX say in the name of the operation what always jumps.
            always = self.operation.startswith("s_branch") or (self.certain and "s_c" not in self.operation)
            return not always or "," in self.operands or ".DIV" in self.operation
        return self.kind != "ends" or not self.certain


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
    """The loops that hold no other loop, in the order in which they lie, without those that only wait."""
    lines, labels = _read(code)
    work = {place for place, line in enumerate(lines) if line.kind not in ("", "waits", "barriers", "jumps", "ends")}
    follow = {place: _after(place, line, labels.get(line.target), len(lines)) for place, line in enumerate(lines)}
    return [_loop([lines[place] for place in sorted(turn)]) for turn in sorted(_innermost(follow, work), key=min)]


def _after(place: int, line: _Line, target: int | None, count: int) -> set[int]:
    """The places of the lines that may follow. A jump whose target is not in the code counts as none."""
    next_line = {place + 1} if line.goes_on or (line.kind == "jumps" and target is None) else set()
    return {found for found in (*next_line, target) if found is not None and found < count}


def _innermost(follow: Mapping[int, set[int]], work: set[int]) -> Iterator[set[int]]:
    """The innermost loops with work in them: without the jumps to its first place, a loop falls apart into inner ones.

    The compiler may lay the first place of a loop behind its others, so jumps backwards alone do not show the loops.
    """
    for turn in (found for found in _cycles(follow) if found & work):
        entered = {after for place in follow.keys() - turn for after in follow[place] & turn}
        head = min(entered, default=min(turn))
        inner = [*_innermost({place: (follow[place] & turn) - {head} for place in turn}, work)]
        yield from inner or [turn]


def _cycles(follow: Mapping[int, set[int]]) -> Iterator[set[int]]:
    """The strongly connected components that hold a cycle (Kosaraju's two passes)."""
    before: dict[int, set[int]] = {place: set() for place in follow}
    for place, after in follow.items():
        for other in after:
            before[other].add(place)
    seen: set[int] = set()
    last_left = [place for start in follow for place in _left(start, follow, seen)]
    seen = set()
    for start in reversed(last_left):
        found = set(_left(start, before, seen))
        if len(found) > 1 or (found and start in follow[start]):
            yield found


def _left(start: int, follow: Mapping[int, set[int]], seen: set[int]) -> list[int]:
    """The places that are reached from ``start`` and not seen before, as a depth-first search leaves them."""
    if start in seen:
        return []
    seen.add(start)
    left, path = [], [(start, iter(follow[start]))]
    while path:
        place, others = path[-1]
        other = next((o for o in others if o not in seen), None)
        if other is None:
            left.append(place)
            path.pop()
        else:
            seen.add(other)
            path.append((other, iter(follow[other])))
    return left


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
            lines.append(_Line(kind, match["operation"], match["operands"], not match["predicate"]))
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
