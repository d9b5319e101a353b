"""What no real file reaches. Beyond it a file is refused by an error that names the field, instead of being worked on
without end or held in memory: a small file can ask for any amount of either. docs/security.md says how they are meant.
"""

from __future__ import annotations

from pathlib import Path

from ..errors import SourceError

# Bytes of a file. The largest of their kind seen: 3 MB (a config with a vocabulary in it), 30 MB (an index that lists
# codes and scales of every expert of a 1T model); a ranking takes 500 bytes for every matrix.
LARGEST_CONFIG = 16 << 20
LARGEST_INDEX = 256 << 20
LARGEST_RANKING = 1 << 30
MOST_VALUES = 1 << 22  # values of one JSON document; each takes up to 100 bytes in memory
MOST_VALUES_OF_INDEX = 1 << 21
MOST_VALUES_OF_HEADER = 1 << 24  # of safetensors: eight for each tensor
MOST_VALUES_OF_RANKING = 1 << 26

DEEPEST = 60  # lists and objects inside of each other, in metadata

MOST_TENSORS = 1 << 20  # of a model; 281,000 seen
MOST_SHARDS = 10_000  # that an index lists; 200 seen
LONGEST_NAME = 1024  # characters of a tensor's name; 150 seen
MOST_DIGITS = 6  # of a number that counts layers or experts
MOST_DIMENSIONS = 64  # of a tensor; torch itself takes no more

# What a config may ask for when the model is built without values.
MOST_COUNTED = 100_000  # layers, experts, heads: 2,048 seen
MOST_LABELS = 1 << 20  # 30,522 seen
MOST_MODULES = 1 << 16  # modules altogether; 13,000 seen

LONGEST_PATTERN = 1024  # characters of a regular expression in a file
MOST_PATTERNS = 1024  # of them in one list; names without wildcards do not count

# Of the header of a GGUF file.
MOST_PAIRS = 1 << 16  # keys and values; 100 seen
MOST_STRINGS = 1 << 22  # in all arrays together; 800,000 seen


def check_limit(where: str | Path, field: str, found: int, limit: int) -> None:
    """Refuse what no real file reaches.

    where: the file.  field: what in it is counted, for the message.

    Raises:
        SourceError: ``found`` is more than ``limit``.
    """
    if found > limit:
        raise SourceError(
            f"{where}: {field} is {_shown(found)}, and more than {limit:,} are taken for damage or an attack: correct "
            "it, or download the file again"
        )


def _shown(number: int) -> str:
    return f"{number:,}" if number < 10**30 else f"a number of {number.bit_length()} bits"
