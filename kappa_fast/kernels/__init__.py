"""The GPU kernels. Their files live in the top-level folder ``kernels/`` of the repository.

That folder has no ``__init__.py``: a package called ``kernels`` would hide the one of Hugging Face from everybody who
runs Python in the clone. The build copies the files beside this one; in a clone, and so in an editable install, they
are found where they lie.
"""

from pathlib import Path

_root = Path(__file__).resolve().parents[2]
_room = _root / "kernels"

# In site-packages the same path may be somebody else's package: only a source tree, and only a bare folder, will do.
if (_root / "setup.py").is_file() and _room.is_dir() and not (_room / "__init__.py").exists():
    __path__.append(str(_room))
