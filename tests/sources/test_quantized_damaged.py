"""Whatever lies beside codes: a weight of the shape that is told, a reason, or a SourceError, and nothing else."""

from __future__ import annotations

import pytest
import torch
from damaged_codes import DTYPES, SETS
from hypothesis import given
from hypothesis import strategies as st
from models import EVERYTHING

from kappa_fast.errors import SourceError
from kappa_fast.sources.admission import Neighbors, admit
from kappa_fast.sources.base import Stored
from kappa_fast.sources.layouts import layout_of
from kappa_fast.sources.quantized import weights_of
from kappa_fast.sources.tensors import count_weights, digest_of_headers, read_mapping

SETTINGS = ["group_size", "bits", "weight_block_size", "checkpoint_format", "config_groups", "expert_dtype", "ignore"]
VALUES = [
    0,
    -1,
    3,
    16,
    "gptq_v2",
    "fp4",
    [32, 32],
    [0, 0],
    [1],
    {"g": {"targets": ["Linear"], "weights": {"num_bits": 3}}},
]


@st.composite
def damaged(draw: st.DrawFn) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    tensors, settings = draw(st.sampled_from(SETS))
    tensors = dict(tensors)
    for name in draw(st.lists(st.sampled_from(sorted(tensors)), max_size=2, unique=True)):
        how = draw(st.sampled_from(["lost", "dtype", "shape", "stacked"]))
        tensor = tensors.pop(name)
        if how == "dtype":
            tensors[name] = tensor.float().to(draw(st.sampled_from(DTYPES)))
        elif how == "shape":
            sizes = draw(st.lists(st.sampled_from([0, 1, 2, 4, 8, 16, 64]), max_size=4))
            tensors[name] = torch.ones(sizes).to(tensor.dtype)
        elif how == "stacked":
            tensors[name] = torch.stack([tensor.view(torch.uint8)] * 2).view(tensor.dtype) if tensor.dim() else tensor
    if draw(st.booleans()):
        settings = settings | {draw(st.sampled_from(SETTINGS)): draw(st.sampled_from(VALUES))}
    return tensors, settings


@given(damaged())
def test_damage_is_a_source_error_or_shows_in_nothing_but_values(found):
    tensors, settings = found
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    raw = [_stored(name, tensor) for name, tensor in tensors.items()]
    try:
        weights = weights_of(raw, settings)
        for stored in weights:
            if stored.quantization is not None:
                _load_all(stored, weights)
        refused = "".join(str(stored.error) for stored in weights if stored.error is not None)
    except SourceError as error:
        refused = str(error)
    if refused:
        assert "'a." in refused or "'experts." in refused
        return
    assert [t.names[-1] for t in weights] == list(tensors)
    assert count_weights(weights) >= 0
    assert digest_of_headers(weights)
    for name, tensor in tensors.items():
        assert torch.equal(tensor.flatten().view(torch.uint8), before[name].flatten().view(torch.uint8)), name


def _stored(name: str, tensor: torch.Tensor) -> Stored:
    (stored,) = read_mapping({"x": tensor}).tensors
    return Stored((name,), tuple(tensor.shape), tensor.dtype, tensor.device, stored.take)


def _load_all(stored: Stored, weights: list[Stored]) -> None:
    around = {t.name: t.shape for t in weights}
    assert len(stored.shape) in (2, 3)
    assert 0 not in stored.shape
    for part in layout_of(stored, around, True).parts:
        loaded = stored.take(part.index)
        assert tuple(loaded.shape) == part.shape
        assert loaded.dtype == stored.dtype
    surroundings = Neighbors(around, frozenset(), frozenset(), False)
    assert admit(stored, surroundings).reason is None
    assert EVERYTHING.reason(stored, surroundings) is None


@pytest.mark.parametrize("number", range(len(SETS)))
def test_without_damage_every_set_is_a_weight(number):
    tensors, settings = SETS[number]
    weights = weights_of([_stored(name, tensor) for name, tensor in tensors.items()], settings)
    assert len([t for t in weights if t.quantization]) == 1
