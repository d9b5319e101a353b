"""Combines the parts of reparametrized weights in files: weight norm, spectral norm, pruning masks.

A module computes such a weight from its parts at each use; a file has only the parts. Known parts are combined as torch
does it. Other parametrizations are skipped with a reason, because a file does not say which class computes the weight.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from ..errors import SourceError
from ..results.entries import Index
from .base import Role, Stamp, Stored

Compute = Callable[[Mapping[str, torch.Tensor]], torch.Tensor]

_PARAMETRIZED = re.compile(r"^(?P<owner>(?:.*\.)?)parametrizations\.(?P<leaf>[^.]+)\.(?P<part>.+)$")
# Names of masks with which a module multiplies its weight, and of scores from which it computes a mask.
PRUNED = "pruned: weight x mask"
_MASKS, _SCORES = ("mask", "weight_mask"), ("mask_scores", "weight_scores", "scores")


def combine_parts(tensors: Sequence[Stored]) -> list[Stored]:
    """Return the tensors of a file or a state dict, with the main part of each known weight replaced by the weight.

    The other parts stay, with a reason in ``problem``; those that are not parameters get the role "ingredient".
    """
    found = _Found(tensors)
    for name in found.names:
        if name.endswith("_orig") and len(found[name].shape) >= 2:
            found.pruned_or_spectral(name.removesuffix("_orig"))
    for name in found.names:
        if name.endswith("_v") and f"{name[:-2]}_g" in found:
            found.weight_norm(name[:-2], f"{name[:-2]}_g", name)
    parametrized: dict[str, dict[str, str]] = {}
    for name in found.names:
        if parts := _PARAMETRIZED.match(name):
            parametrized.setdefault(parts["owner"] + parts["leaf"], {})[parts["part"]] = name
    for name, of_it in parametrized.items():
        found.parametrized(name, of_it)
    for name in found.names:
        if name == "weight" or name.endswith(".weight"):
            found.masked(name)
    return found.tensors


@dataclass(frozen=True)
class _Combined:
    """``Stored.take`` of a weight that is computed from its parts."""

    parts: Mapping[str, Stored]
    compute: Compute

    def __call__(self, index: Index, device: torch.device | None = None) -> torch.Tensor:
        taken = {role: stored.take(()) for role, stored in self.parts.items()}
        if device is not None:
            taken = {role: tensor.to(device) for role, tensor in taken.items()}
        whole = self.compute(taken)
        return whole[index].clone() if index else whole


class _Found:
    """The tensors in their order, with look-up by all names; the methods replace and mark tensors."""

    def __init__(self, tensors: Sequence[Stored]) -> None:
        self.tensors = list(tensors)
        usable = [i for i, t in enumerate(tensors) if t.parent is None and t.problem is None and t.error is None]
        self._at = {name: i for i in usable for name in tensors[i].names}

    def __contains__(self, name: str) -> bool:
        return name in self._at

    @property
    def names(self) -> list[str]:
        """The first name of each usable tensor."""
        return [t.name for t in self.tensors if t.name in self._at]

    def get(self, name: str) -> Stored | None:
        return self.tensors[self._at[name]] if name in self._at else None

    def __getitem__(self, name: str) -> Stored:
        return self.tensors[self._at[name]]

    def pruned_or_spectral(self, name: str) -> None:
        """Combine the parts of torch.nn.utils.prune or torch.nn.utils.spectral_norm, which both have ``name_orig``."""
        parts = {part: f"{name}_{part}" for part in ("orig", "mask", "u", "v") if f"{name}_{part}" in self._at}
        if parts.keys() == {"orig", "mask"} and self[parts["orig"]].shape == self[parts["mask"]].shape:
            self._combine(name, {"original": parts["orig"], "mask": parts["mask"]}, _masked, PRUNED, ("mask",))
        elif parts.keys() == {"orig", "u", "v"}:
            self._spectral(name, parts["orig"], parts["u"], parts["v"])
        elif len(parts) > 1:
            self._leave(parts.values(), "how to combine them is not known")

    def weight_norm(self, name: str, g: str, v: str) -> None:
        """Combine g V / |V|, of torch.nn.utils.weight_norm and torch.nn.utils.parametrizations.weight_norm."""
        direction, length = self[v].shape, self[g].shape
        dim = _norm_dim(direction, length)
        if dim is not None:
            self._combine(name, {"original": v, "g": g}, _WeightNorm(dim), "weight norm: g V / |V|")
        elif len(direction) >= 2:
            self._leave((g, v), "the lengths of the weight norm do not match its directions")

    def parametrized(self, name: str, of_it: Mapping[str, str]) -> None:
        """Combine the parts of torch.nn.utils.parametrize: originals, and tensors of numbered parametrizations."""
        original = of_it.get("original")
        if original is not None and self[original].quantization is not None:
            return  # the original was quantized, and is dequantized already
        if of_it.keys() == {"original0", "original1"}:
            self.weight_norm(name, of_it["original0"], of_it["original1"])
        elif of_it.keys() == {"original", "0.mask"} and self[of_it["original"]].shape == self[of_it["0.mask"]].shape:
            self._combine(name, {"original": of_it["original"], "mask": of_it["0.mask"]}, _masked, PRUNED, ("mask",))
        elif of_it.keys() == {"original", "0._u", "0._v"}:
            self._spectral(name, of_it["original"], of_it["0._u"], of_it["0._v"])
        else:
            self._leave(of_it.values(), "a file does not say what computes the weight: rank the model")

    def masked(self, name: str) -> None:
        """Combine a weight with a mask of the same shape in the same module: the module multiplies them."""
        weight, owner = self[name], name.removesuffix("weight")
        if weight.quantization is not None or len(weight.shape) < 2 or not _floats(weight):
            return
        alike = {leaf for leaf in (*_MASKS, *_SCORES) if (t := self.get(owner + leaf)) and t.shape == weight.shape}
        mask, scores = ([leaf for leaf in of if leaf in alike] for of in (_MASKS, _SCORES))
        if scores:
            self._leave((name, owner + scores[0]), "scores select entries, by a rule that a file does not contain")
        elif mask:
            self._combine(name, {"original": name, "mask": owner + mask[0]}, _masked, PRUNED, ("mask",))

    def _spectral(self, name: str, original: str, u: str, v: str) -> None:
        dim = _spectral_dim(self[original], self[u], self[v])
        if dim is None:
            self._leave((original, u, v), "how to combine them is not known")
            return
        parts = {"original": original, "u": u, "v": v}
        self._combine(name, parts, _Spectral(dim), "spectral norm: weight / sigma", ("u", "v"))

    def _combine(
        self, name: str, names: Mapping[str, str], compute: Compute, evidence: str, buffers: Sequence[str] = ()
    ) -> None:
        parts = {role: self[part] for role, part in names.items()}
        main = parts["original"]
        plain = self.get(name)
        if plain is not None and plain is not main:
            error = SourceError(
                f"{name!r} is stored twice, as a whole and in parts ({main.name!r}): remove one of them, or leave it "
                f"out with exclude={name!r}"
            )
            self.tensors[self._at[name]] = replace(plain, error=error)
            return
        size = main.numel * (main.dtype.itemsize if main.dtype is not None else 1)
        whole = replace(
            main,
            names=tuple(dict.fromkeys((name, *main.names))),
            take=_Combined(parts, compute),
            is_spread=any(part.is_spread for part in parts.values()),
            overhead=3 * size,  # the parts, and an intermediate product
            prefetch=_Prefetch(tuple(parts.values())) if main.prefetch is not None else None,
            stamp=Stamp.joined([part.stamp for part in parts.values()], evidence),
            evidence=f"computed as torch does ({evidence})",
        )
        for role in names.keys() - {"original"}:
            self._mark(names[role], f"part of a weight that is ranked whole ({evidence})", role in buffers)
        position = self._at[names["original"]]
        self.tensors[position] = whole
        self._at[name] = position

    def _leave(self, parts: Iterable[str], why: str) -> None:
        named = ", ".join(sorted({_leaf(part) for part in parts}))
        for part in parts:
            self._mark(part, f"part of a reparametrized weight ({named}): {why}")

    def _mark(self, name: str, problem: str, is_buffer: bool = False) -> None:
        part = self[name]
        roles: frozenset[Role] = part.roles | {"ingredient"} if is_buffer else part.roles
        self.tensors[self._at[name]] = replace(part, problem=problem, roles=roles)


@dataclass(frozen=True)
class _Prefetch:
    parts: tuple[Stored, ...]

    def __call__(self, index: Index) -> None:
        for part in self.parts:
            if part.prefetch is not None:
                part.prefetch(())


def _leaf(name: str) -> str:
    found = _PARAMETRIZED.match(name)
    return f"parametrizations.{found['leaf']}.{found['part']}" if found else name.rpartition(".")[2]


def _floats(stored: Stored) -> bool:
    return stored.dtype is not None and stored.dtype.is_floating_point and stored.dtype.itemsize > 1


def _norm_dim(shape: tuple[int, ...], lengths: tuple[int, ...]) -> int | None:
    """Return the dimension with one length per slice, -1 for one length of the whole; None if the shapes do not fit."""
    if len(shape) < 2:
        return None
    if math.prod(lengths) == 1:
        return -1 if len(lengths) == 0 or 1 not in shape else (0 if shape[0] == 1 else None)
    if len(lengths) != len(shape):
        return None
    kept = [d for d, size in enumerate(lengths) if size != 1]
    return kept[0] if len(kept) == 1 and lengths[kept[0]] == shape[kept[0]] else None


def _spectral_dim(original: Stored, u: Stored, v: Stored) -> int | None:
    """Return the dimension of ``u``: 0, or 1 for transposed convolutions; None if the shapes do not fit."""
    fitting = [
        dim
        for dim in range(min(2, len(original.shape)))
        if u.shape == (original.shape[dim],) and v.shape == (original.numel // max(1, original.shape[dim]),)
    ]
    if len(original.shape) == 2 and 0 in fitting:
        return 0
    return fitting[0] if len(fitting) == 1 else None


def _masked(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return parts["original"] * parts["mask"].to(parts["original"].dtype)


@dataclass(frozen=True)
class _WeightNorm:
    dim: int  # -1: one length of the whole weight

    def __call__(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return torch._weight_norm(parts["original"], parts["g"], self.dim)


@dataclass(frozen=True)
class _Spectral:
    dim: int

    def __call__(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        weight = parts["original"]
        matrix = weight.movedim(self.dim, 0).flatten(1)
        return weight / torch.dot(parts["u"], torch.mv(matrix, parts["v"]))
