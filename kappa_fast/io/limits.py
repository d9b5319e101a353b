"""Limits on what an untrusted file may ask for; every real file stays far below them.

A small file can ask for any amount of memory or time. docs/security.md explains the limits.
"""

from __future__ import annotations

from pathlib import Path

from ..errors import SourceError

# Sizes of files in bytes. The largest real files seen: 3 MB for a config (it contains a vocabulary), 30 MB for an index
# (it lists codes and scales of every expert of a 1T model). A ranking takes 500 bytes per matrix.
LARGEST_CONFIG = 16 << 20
LARGEST_INDEX = 256 << 20
LARGEST_RANKING = 1 << 30
MOST_VALUES = 1 << 22  # values in one JSON document; each takes up to 100 bytes in memory
MOST_VALUES_OF_INDEX = 1 << 21
MOST_VALUES_OF_HEADER = 1 << 24  # a safetensors header has eight values per tensor
MOST_VALUES_OF_RANKING = 1 << 26

DEEPEST = 60  # nesting depth of lists and objects in metadata

MOST_TENSORS = 1 << 20  # tensors of a model; 281,000 seen
MOST_SHARDS = 10_000  # shards that an index lists; 200 seen
LONGEST_NAME = 1024  # characters of a tensor's name; 150 seen
MOST_DIGITS = 6  # digits of the number of a layer or an expert
MOST_DIMENSIONS = 64  # dimensions of a tensor; torch itself supports no more

# Numbers that a config may contain when the model is built on the meta device.
MOST_COUNTED = 100_000  # layers, experts, heads: 2,048 seen
MOST_LABELS = 1 << 20  # labels or classes: 30,522 seen
MOST_MODULES = 1 << 16  # modules of the whole model; 13,000 seen

LONGEST_PATTERN = 1024  # characters of a regular expression in a file
MOST_PATTERNS = 1024  # patterns in one list; names without wildcards do not count

# The header of a GGUF file.
MOST_PAIRS = 1 << 16  # pairs of a key and a value; 100 seen
MOST_STRINGS = 1 << 22  # strings in all arrays together; 800,000 seen


def check_limit(where: str | Path, field: str, found: int, limit: int) -> None:
    """Raise if a file asks for more than ``limit``.

    where: the file.  field: what is counted, for the message.  found: the number in the file.

    Raises:
        SourceError: ``found`` is more than ``limit``.
    """
    if found > limit:
        raise SourceError(
            f"{where}: {field} is {_shown(found)}, and more than {limit:,} is treated as damage or an attack: correct "
            "the file, or download it again"
        )


def _shown(number: int) -> str:
    return f"{number:,}" if number < 10**30 else f"a number of {number.bit_length()} bits"
