"""What lies beside weights in a file without being one: masks, statistics, rotations, corrections, optimizer state.

A file says nothing of modules, but what modules have can be told from it. A module that has a ``weight`` with two or
more dimensions has no other parameter with two or more dimensions but biases (so in torch.nn and in all of
transformers), and nothing at all is called ``weight.something``. What breaks these rules is no parameter.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

import torch

from ..errors import SourceError
from . import codes, names
from .base import Stored

# What a module with a weight has beside it.
_BESIDE_WEIGHT = re.compile(r"weight\d?|\w*bias(?:_[kuv])?|in_proj_weight|[qkv]_proj_weight")
# Modules put this between the name of a parameter and what it is computed from.
_PARAMETRIZED = ".parametrizations."
_BENEATH = re.compile(r"^(?P<owner>.*\.weight|weight)\.[^.]+")
# What optimizers keep for every parameter, in the names of files and as they put it around those of parameters.
_OPTIMIZER = re.compile(
    r"(?:^|\.)(?:optim(?:izer)?(?:_states?)?|exp_avgs?|exp_avg_sqs?(?:_row|_col)?|max_exp_avg_sqs?|adam_[mv]|momentum_buffers?|square_avg"
    r"|acc_delta|prev_step_size)(?:\.|$)"
)
_FLAT = re.compile(r"(?:^|\.)_?flat_param(?:_\d+)?$")
MAY_BE_CODES = "floats with scales and zero points beside them: they may be codes, and nothing says so"
# What a file may hold once more for every weight, under the name of the weight: averages, statistics, optimizer state.
# The first words are no modules of a model; the others are a copy only of what has the whole rest of the name.
_AVERAGES = r"ema|swa|fisher|hessians?|imatrix|task_vectors?|exp_avg|exp_avg_sq|momentum_buffer"
_COPIES = re.compile(rf"^(?P<word>(?:\w+_)?(?:{_AVERAGES})(?:_\w+)?)\.(?P<of>.+)")
_COPIES_OF_ALL = re.compile(
    r"^(?P<word>(?:shadow|importances?|saliency|sensitivity|grads?|gradients?|deltas?|diffs?|masks?|mu|nu)(?:_\w+)?)\.(?P<of>.+)"
)
# Integers that index, count or mask in ordinary modules; codes come in other types.
_INDICES = (torch.int64, torch.bool)


def without_ingredients(tensors: Sequence[Stored], method: str = "") -> list[Stored]:
    """The tensors of a file or a state dict, with a reason in ``problem`` for those that no module has as a parameter.

    They get the role "ingredient", so that nobody counts them among the weights.

    Args:
        tensors: all of them, after codes were replaced by the weights that they stand for.
        method: how the config says that the model was quantized, if that is a method which is not known here.
    """
    shapes = {name: t.shape for t in tensors for name in t.names}
    unread, copied = _owners_of_unread_codes(tensors), _Copies(shapes)
    marked = []
    for stored in tensors:
        reason = None
        if len(stored.shape) == 1 and any(_FLAT.search(name) for name in stored.names):
            stored = replace(stored, error=_flattened(stored.name))
        undecided = stored.quantization is None and stored.problem is None and stored.error is None
        if stored.parent is None and undecided and not stored.evidence:
            reason = next((r for name in stored.names if (r := _reason(stored, name, shapes, unread, copied))), None)
            if reason is None and method and not any(names.is_parameter(name) for name in stored.names):
                reason = f"no parameter by its name, in a model quantized by {method}; {codes.NOT_SUPPORTED}"
            if reason is None and "scales" not in stored.roles:
                reason = next((r for name in stored.names if (r := _above_codes(stored, name, unread))), None)
        marked.append(_marked(stored, reason) if reason is not None else stored)
    return marked


def _flattened(name: str) -> SourceError:
    return SourceError(
        f"{name!r} holds the weights of many modules as one line of numbers, as FSDP keeps them, and nothing says "
        "where each begins: save the model with a full state dict, and rank that"
    )


def _marked(stored: Stored, reason: str) -> Stored:
    if reason == MAY_BE_CODES:
        return replace(stored, problem=reason)  # a weight all the same, as far as counting goes
    return replace(stored, problem=reason, roles=stored.roles | {"ingredient"})


class _Copies:
    """What a file holds once more, by its name: ``ema.a.weight`` beside ``a.weight`` or beside ``model.a.weight``."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._shapes = shapes
        self._of_root: dict[str, set[tuple[str, tuple[int, ...]]]] = {}
        for n, shape in shapes.items():
            if len(shape) >= 2:
                root, _, rest = n.partition(".")
                self._of_root.setdefault(root, set()).add((rest, shape))
        self._joined: set[tuple[str, tuple[int, ...]]] | None = None

    def word(self, name: str, shape: tuple[int, ...]) -> str | None:
        """The word before the name of the other weight, None if it is no copy."""
        found = _COPIES.match(name) or _COPIES_OF_ALL.match(name)
        if found is None:
            return None
        of = found["of"]
        twin = self._shapes.get(of) == shape
        if found.re is _COPIES:
            twin = twin or (self._is_another_model(found["word"]) if "." in of else self._is_joined(of, shape))
        return found["word"] if twin else None

    def _is_another_model(self, word: str) -> bool:
        """Whether all matrices under this word are those of another root; a single pair may be two modules of one."""
        own = self._of_root.get(word, set())
        return len(own) > 1 and any(
            own == other for root, other in self._of_root.items() if not _COPIES.match(f"{root}.x")
        )

    def _is_joined(self, of: str, shape: tuple[int, ...]) -> bool:
        """Whether it is a name without dots, whole or without its first word, as buffers of averages are called."""
        if self._joined is None:
            every = {(n, s) for n, s in self._shapes.items() if "." in n}
            below = {(n.partition(".")[2], s) for n, s in every if not _COPIES.match(n)}
            self._joined = {(n.replace(".", ""), s) for n, s in every | below}
        return (of, shape) in self._joined


def _reason(
    stored: Stored, name: str, shapes: dict[str, tuple[int, ...]], unread: dict[str, str], copied: _Copies
) -> str | None:
    floats = stored.dtype is not None and stored.dtype.is_floating_point
    if not floats or "scales" in stored.roles:
        return None
    if _OPTIMIZER.search(name):
        return "state of an optimizer, not a weight"
    beneath = _BENEATH.match(name)
    a_module = beneath is not None and beneath["owner"] not in shapes and name.endswith(".weight")  # called weight
    if beneath is not None and not a_module and _PARAMETRIZED not in name:
        return f"belongs to a weight ({_last(beneath['owner'])}.{_last(name)}), and is none itself"
    if (word := copied.word(name, stored.shape)) is not None:
        return f"statistics or a copy of another weight ({word}), not a weight"
    owner, _, leaf = name.rpartition(".")
    start = f"{owner}." if owner else ""
    if leaf == "weight" and start + "scales" in shapes and not shapes.keys().isdisjoint({start + z for z in _ZEROS}):
        return MAY_BE_CODES
    above = owner.rpartition(".")[0]
    if unread.get(above) in CODES and leaf == "weight":
        return f"in a quantized layer ({unread[above]}); {codes.NOT_SUPPORTED}"
    plain = leaf == "weight" and not _CODED.search(unread.get(owner, "weight"))  # beside a table or a state in bytes
    if owner in unread and not plain and (leaf != "bias" or len(stored.shape) >= 2):
        return f"part of a quantized layer ({unread[owner]}); {codes.NOT_SUPPORTED}"
    weight = shapes.get(f"{owner}.weight" if owner else "weight", ())
    if len(stored.shape) >= 2 and len(weight) >= 2 and not _BESIDE_WEIGHT.fullmatch(leaf):
        return f"beside the weight of its module, where no module has a parameter ({leaf})"
    return None


def _above_codes(stored: Stored, name: str, unread: Mapping[str, str]) -> str | None:
    """A reason against rotations, code books and the like in a module that has one with codes inside."""
    if len(stored.shape) < 2 or names.is_parameter(name) or codes.may_be_codes(stored.dtype):
        return None
    found = _codes_below(name.rpartition(".")[0], unread)
    return found and f"no parameter by its name, beside a quantized layer ({found}); {codes.NOT_SUPPORTED}"


def _owners_of_unread_codes(tensors: Sequence[Stored]) -> dict[str, str]:
    """Modules that hold codes which nothing has dequantized, and what those are called."""
    owners: dict[str, str] = {}
    for stored in tensors:
        if is_unread(stored):
            for name in stored.names:
                owner, _, leaf = name.rpartition(".")
                if owner or leaf in CODES:
                    owners.setdefault(owner, leaf)
    return owners


def _codes_below(owner: str, unread: Mapping[str, str]) -> str | None:
    """What the codes are called that a module inside of this one holds: rotations and code books may lie above them."""
    return next((leaf for name, leaf in unread.items() if owner and name.startswith(f"{owner}.")), None)


# Names under which codes lie in a state dict of one layer, where other integers may be anything.
CODES = frozenset(
    {"weight", "qweight", "weight_packed", "W_q", "codes", "q_weight", "Qidxs", "trellis", "B", "bitmask"}
)
# Ordinary modules hold small integers too: with 32 bits codes have one of these in their names, ...
_CODED = re.compile(r"(?:^|\.)[^.]*(?:weight|pack|code|indices|trellis|quant|W_q|Qidxs)[^.]*$|(?:^|\.)B$")
# ... and with fewer, indices and masks have one of these.
_INDEXED = re.compile(r"(?:mask|ind(?:ex|ices)|idx|ids|positions?|map|table)s?$")


def is_unread(stored: Stored) -> bool:
    """True for codes that nothing has dequantized: bytes and small integers with the shape of a matrix."""
    if stored.quantization is not None or "scales" in stored.roles or stored.dtype is None:
        return False
    if not codes.may_be_codes(stored.dtype) or stored.dtype in _INDICES or len(stored.shape) < 2:
        return False
    coded = any(_CODED.search(name) for name in stored.names)
    if not coded and (stored.dtype == torch.int32 or any(_INDEXED.search(name) for name in stored.names)):
        return False
    whole = stored.dtype in codes.RANKED and stored.problem is None  # float8 that are weights as they stand
    return not whole and not any(names.is_buffer(name) for name in stored.names)


def _last(name: str) -> str:
    return name.rpartition(".")[2]


_ZEROS = ("zeros", "qzeros", "zero_points", "biases")

# What may lie beside codes without changing the weight that they stand for: biases, and what activations are
# quantized with. Everything else may be a rotation, a correction, a smoothing factor, ...
_HARMLESS = re.compile(
    r"bias|(?:(?:input|output|activation|act|query|key|value|prob_output|attn|kv|[qkv]|bmm)_)+"
    r"(?:global_|per_tensor_|quant_)?(?:scale|zero_point|g_idx|amax)(?:_ub|_inv)?|scale_(?:input|output)|scaled_fp8"
)


def by_owner(all_names: Iterable[str]) -> dict[str, list[str]]:
    """The names under that of the module they belong to, and, with ``.*``, under that of the module around it."""
    found: dict[str, list[str]] = {}
    for name in all_names:
        owner = name.rpartition(".")[0]
        found.setdefault(owner, []).append(name)
        found.setdefault(f"{owner.rpartition('.')[0]}.*", []).append(name)
    return found


def strangers(name: str, known: Collection[str], owned: Mapping[str, Sequence[str]]) -> list[str]:
    """What lies beside codes that no format puts there, by the last word of its name.

    Args:
        name: of the codes.
        known: names of all that belongs to the codes, and of other weights.
        owned: the names of all tensors as ``by_owner`` has them.
    """
    owner, _, leaf = name.rpartition(".")
    beside = [n for n in (*owned.get(owner, ()), *owned.get(name, ())) if n not in known]
    if leaf in CODES:
        inner = owned.get(f"{owner}.*", ()) if owner else ()  # a module in the quantized one: a rotation, an adapter
        strange = [n for n in inner if n not in known and not names.is_adapter(n, in_peft=True)]
        strange = [".".join(n.rsplit(".", 2)[1:]) for n in strange if not n.startswith(f"{name}.")]
        return strange + [_last(n) for n in beside if not _HARMLESS.fullmatch(_last(n))]
    stem = re.sub(r"_(?:blocks|qdata)$", "", leaf).removeprefix("_")  # one of several parameters of a module
    of_it = re.compile(rf"_?{re.escape(stem)}_(?!bias$)")
    return [_last(n) for n in beside if of_it.match(_last(n))]
