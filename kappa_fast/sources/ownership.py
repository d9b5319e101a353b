"""Finds tensors of a file that are not parameters: masks, statistics, rotations, corrections, optimizer state.

A file does not describe the modules, but the names show which tensors belong to one module. In torch.nn and in all of
transformers, a module that has a ``weight`` with two or more dimensions has no other parameter with two or more
dimensions except biases, and no parameter is called ``weight.something``. A tensor that breaks these rules is not a
parameter.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

import torch

from ..errors import SourceError
from . import codes, names
from .base import Stored

# Other parameters that a module with a weight may have.
_BESIDE_WEIGHT = re.compile(r"weight\d?|\w*bias(?:_[kuv])?|in_proj_weight|[qkv]_proj_weight")
# torch.nn.utils.parametrize puts this between the name of a module and the names of the parts of its parameter.
_PARAMETRIZED = ".parametrizations."
_BENEATH = re.compile(r"^(?P<owner>.*\.weight|weight)\.[^.]+")
# Names of the state that optimizers keep for every parameter.
_OPTIMIZER = re.compile(
    r"(?:^|\.)(?:optim(?:izer)?(?:_states?)?|exp_avgs?|exp_avg_sqs?(?:_row|_col)?|max_exp_avg_sqs?|adam_[mv]|momentum_buffers?|square_avg"
    r"|acc_delta|prev_step_size)(?:\.|$)"
)
_FLAT = re.compile(r"(?:^|\.)_?flat_param(?:_\d+)?$")
MAY_BE_CODES = "floats in a layer with scales and zero points: the values may be codes, and no config says so"
# First words of the names of copies of weights: averages, statistics, optimizer state. The words of _COPIES are never
# modules of a model; those of _COPIES_OF_ALL count only if the rest of the name is exactly that of another tensor.
_AVERAGES = r"ema|swa|fisher|hessians?|imatrix|task_vectors?|exp_avg|exp_avg_sq|momentum_buffer"
_COPIES = re.compile(rf"^(?P<word>(?:\w+_)?(?:{_AVERAGES})(?:_\w+)?)\.(?P<of>.+)")
_COPIES_OF_ALL = re.compile(
    r"^(?P<word>(?:shadow|importances?|saliency|sensitivity|grads?|gradients?|deltas?|diffs?|masks?|mu|nu)(?:_\w+)?)\.(?P<of>.+)"
)
# Dtypes of indices, counters and masks in ordinary modules; codes have other dtypes.
_INDICES = (torch.int64, torch.bool)


def without_ingredients(tensors: Sequence[Stored], method: str = "") -> list[Stored]:
    """Return the tensors of a file or a state dict, with a reason in ``problem`` for those that are not parameters.

    These get the role "ingredient", so that they are not counted as weights.

    Args:
        tensors: all tensors, after codes were replaced by the weights that they encode.
        method: the quantization method that the config names, if this package does not know it; else "".
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
                reason = f"not a parameter by its name, in a model quantized by {method}; {codes.NOT_SUPPORTED}"
            if reason is None and "scales" not in stored.roles:
                reason = next((r for name in stored.names if (r := _above_codes(stored, name, unread))), None)
        marked.append(_marked(stored, reason) if reason is not None else stored)
    return marked


def _flattened(name: str) -> SourceError:
    return SourceError(
        f"{name!r} holds the weights of many modules as one flat tensor of FSDP, and the file does not say where each "
        "weight begins: save the model with a full state dict, and rank that"
    )


def _marked(stored: Stored, reason: str) -> Stored:
    if reason == MAY_BE_CODES:
        return replace(stored, problem=reason)  # without the role, so that the tensor counts as a weight
    return replace(stored, problem=reason, roles=stored.roles | {"ingredient"})


class _Copies:
    """Recognizes copies of weights by name: ``ema.a.weight`` if there is ``a.weight`` or ``model.a.weight``."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._shapes = shapes
        self._of_root: dict[str, set[tuple[str, tuple[int, ...]]]] = {}
        for n, shape in shapes.items():
            if len(shape) >= 2:
                root, _, rest = n.partition(".")
                self._of_root.setdefault(root, set()).add((rest, shape))
        self._joined: set[tuple[str, tuple[int, ...]]] | None = None

    def word(self, name: str, shape: tuple[int, ...]) -> str | None:
        """Return the word before the name of the other weight; None if the tensor is not a copy."""
        found = _COPIES.match(name) or _COPIES_OF_ALL.match(name)
        if found is None:
            return None
        of = found["of"]
        twin = self._shapes.get(of) == shape
        if found.re is _COPIES:
            twin = twin or (self._is_another_model(found["word"]) if "." in of else self._is_joined(of, shape))
        return found["word"] if twin else None

    def _is_another_model(self, word: str) -> bool:
        """Return whether the matrices under this word are all those of another root.

        A single matrix proves nothing: two modules of one model may have the same names.
        """
        own = self._of_root.get(word, set())
        return len(own) > 1 and any(
            own == other for root, other in self._of_root.items() if not _COPIES.match(f"{root}.x")
        )

    def _is_joined(self, of: str, shape: tuple[int, ...]) -> bool:
        """Return whether ``of`` is another name, whole or without its first word, with the dots left out.

        Averages that are buffers have such names.
        """
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
    a_module = beneath is not None and beneath["owner"] not in shapes and name.endswith(".weight")  # named "weight"
    if beneath is not None and not a_module and _PARAMETRIZED not in name:
        return f"belongs to a weight ({_last(beneath['owner'])}.{_last(name)}), and is not a weight itself"
    if (word := copied.word(name, stored.shape)) is not None:
        return f"statistics or a copy of another weight ({word}), not a weight"
    owner, _, leaf = name.rpartition(".")
    start = f"{owner}." if owner else ""
    if leaf == "weight" and start + "scales" in shapes and not shapes.keys().isdisjoint({start + z for z in _ZEROS}):
        return MAY_BE_CODES
    above = owner.rpartition(".")[0]
    if unread.get(above) in CODES and leaf == "weight":
        return f"in a quantized layer ({unread[above]}); {codes.NOT_SUPPORTED}"
    # A module whose bytes are a table or a state, not codes, may have an ordinary weight.
    plain = leaf == "weight" and not _CODED.search(unread.get(owner, "weight"))
    if owner in unread and not plain and (leaf != "bias" or len(stored.shape) >= 2):
        return f"part of a quantized layer ({unread[owner]}); {codes.NOT_SUPPORTED}"
    weight = shapes.get(f"{owner}.weight" if owner else "weight", ())
    if len(stored.shape) >= 2 and len(weight) >= 2 and not _BESIDE_WEIGHT.fullmatch(leaf):
        return f"modules with a weight have no other parameter with two or more dimensions ({leaf})"
    return None


def _above_codes(stored: Stored, name: str, unread: Mapping[str, str]) -> str | None:
    """Return a reason against rotations, code books and the like in a module that contains a module with codes."""
    if len(stored.shape) < 2 or names.is_parameter(name) or codes.may_be_codes(stored.dtype):
        return None
    found = _codes_below(name.rpartition(".")[0], unread)
    return found and f"not a parameter by its name, around a quantized layer ({found}); {codes.NOT_SUPPORTED}"


def _owners_of_unread_codes(tensors: Sequence[Stored]) -> dict[str, str]:
    """Return the modules that hold codes of unknown formats, with the last word of the name of the codes."""
    owners: dict[str, str] = {}
    for stored in tensors:
        if is_unread(stored):
            for name in stored.names:
                owner, _, leaf = name.rpartition(".")
                if owner or leaf in CODES:
                    owners.setdefault(owner, leaf)
    return owners


def _codes_below(owner: str, unread: Mapping[str, str]) -> str | None:
    """Return the last word of the name of codes in a module below ``owner``, or None."""
    return next((leaf for name, leaf in unread.items() if owner and name.startswith(f"{owner}.")), None)


# Names of codes in the state dict of a single layer, whose other integers may be anything.
CODES = frozenset(
    {"weight", "qweight", "weight_packed", "W_q", "codes", "q_weight", "Qidxs", "trellis", "B", "bitmask"}
)
# Ordinary modules hold integers too. Codes of 32 bits have one of these words in their names, ...
_CODED = re.compile(r"(?:^|\.)[^.]*(?:weight|pack|code|indices|trellis|quant|W_q|Qidxs)[^.]*$|(?:^|\.)B$")
# ... and indices and masks of fewer bits have one of these.
_INDEXED = re.compile(r"(?:mask|ind(?:ex|ices)|idx|ids|positions?|map|table)s?$")


def is_unread(stored: Stored) -> bool:
    """Return True for codes of unknown formats: bytes and small integers with two or more dimensions."""
    if stored.quantization is not None or "scales" in stored.roles or stored.dtype is None:
        return False
    if not codes.may_be_codes(stored.dtype) or stored.dtype in _INDICES or len(stored.shape) < 2:
        return False
    coded = any(_CODED.search(name) for name in stored.names)
    if not coded and (stored.dtype == torch.int32 or any(_INDEXED.search(name) for name in stored.names)):
        return False
    whole = stored.dtype in codes.RANKED and stored.problem is None  # float8 weights without scales
    return not whole and not any(names.is_buffer(name) for name in stored.names)


def _last(name: str) -> str:
    return name.rpartition(".")[2]


_ZEROS = ("zeros", "qzeros", "zero_points", "biases")

# Tensors of a quantized layer that do not change its weight: biases, and the scales of activations. Every other tensor
# may be a rotation, a correction, a smoothing factor, ...
_HARMLESS = re.compile(
    r"bias|(?:(?:input|output|activation|act|query|key|value|prob_output|attn|kv|[qkv]|bmm)_)+"
    r"(?:global_|per_tensor_|quant_)?(?:scale|zero_point|g_idx|amax)(?:_ub|_inv)?|scale_(?:input|output)|scaled_fp8"
)


def by_owner(all_names: Iterable[str]) -> dict[str, list[str]]:
    """Return the names by that of the module they belong to, and, with ``.*`` added, by that of its parent."""
    found: dict[str, list[str]] = {}
    for name in all_names:
        owner = name.rpartition(".")[0]
        found.setdefault(owner, []).append(name)
        found.setdefault(f"{owner.rpartition('.')[0]}.*", []).append(name)
    return found


def unexpected_tensors(name: str, known: Collection[str], owned: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the last words of the names of tensors in a quantized layer that its format does not have.

    Args:
        name: the name of the codes.
        known: the names of codes and their companions.
        owned: the names of all tensors, as ``by_owner`` returns them.
    """
    owner, _, leaf = name.rpartition(".")
    beside = [n for n in (*owned.get(owner, ()), *owned.get(name, ())) if n not in known]
    if leaf in CODES:
        inner = owned.get(f"{owner}.*", ()) if owner else ()  # a child of the quantized module, such as a rotation
        strange = [n for n in inner if n not in known and not names.is_adapter(n, in_peft=True)]
        strange = [".".join(n.rsplit(".", 2)[1:]) for n in strange if not n.startswith(f"{name}.")]
        return strange + [_last(n) for n in beside if not _HARMLESS.fullmatch(_last(n))]
    stem = re.sub(r"_(?:blocks|qdata)$", "", leaf).removeprefix("_")  # the module may have several parameters
    of_it = re.compile(rf"_?{re.escape(stem)}_(?!bias$)")
    return [_last(n) for n in beside if of_it.match(_last(n))]
