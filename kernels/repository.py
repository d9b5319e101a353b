"""Lay these kernels out for Hugging Face's ``kernels`` package: ``python -m kappa_fast.kernels.repository DIR``.

    DIR/build/torch-cuda/__init__.py, metadata.json and the files of this folder; the same for torch-rocm

This is the "noarch" layout, for kernels without compiled parts, with one folder for each backend. The package loads a
folder under a name of its own, so the files import each other relatively, and only torch, Triton and the standard
library besides.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
BACKENDS = ("cuda", "rocm")
VERSION = 1  # raised when an exported function changes its arguments or its result
FAMILIES = (
    "problems",
    "quantize",
    "gram",
    "cholesky",
    "shifted",
    "coarse",
    "triangular",
    "panel",
    "orthogonal",
    "ritz",
    "start",
    "apply",
    "twins",
    "canary",
)


def lay_out(folder: Path, backends: Sequence[str] = BACKENDS) -> list[Path]:
    """Write the repository into ``folder``, replacing old files, and return the folder of every backend."""
    files = sorted(HERE.glob("*.py"))
    files = [file for file in files if file.name != "__init__.py"]
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]
    made = []
    for backend in backends:
        variant = folder / "build" / f"torch-{backend}"
        shutil.rmtree(variant, ignore_errors=True)
        variant.mkdir(parents=True)
        for file in files:
            shutil.copyfile(file, variant / file.name)
        (variant / "__init__.py").write_text(_package(), encoding="utf-8")
        metadata = {
            "id": f"_kappa_fast_{backend}_{digest}",
            "name": "kappa-fast",
            "version": VERSION,
            "license": "Apache-2.0",
            "python-depends": [],
            "backend": {"type": backend},
        }
        (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
        made.append(variant)
    return made


def _package() -> str:
    names = ", ".join(FAMILIES)
    exported = ",\n    ".join(f'"{name}"' for name in FAMILIES)
    return (
        '"""Condition numbers of many matrices at once: Gram matrices, Cholesky, solves, Krylov steps."""\n\n'
        f"from . import {names}\n\n__all__ = [\n    {exported},\n]\n"
    )


def main(arguments: Sequence[str]) -> int:
    """The command: 0 if the repository was written, 2 if no folder was named."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print("usage: python -m kappa_fast.kernels.repository DIR", file=sys.stderr)
        return 2
    for variant in lay_out(Path(arguments[0])):
        print(variant)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
