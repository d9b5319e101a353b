"""What makes a tensor a weight: the evidence is kept, and what cannot be read can be left out."""

from __future__ import annotations

import pytest
import torch
from models import EVERYTHING, weights
from torch import nn

import kappa_fast
from kappa_fast.sources import Filters, open_source
from kappa_fast.sources.admission import by_evidence


def evidence(source: object) -> dict[str, list[str]]:
    return open_source(source, EVERYTHING).metadata["evidence"]


def test_a_parameter_is_a_weight_by_the_class_of_its_module():
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(20, 24), nn.Linear(24, 20)]), "conv": nn.Conv1d(4, 8, 3)})
    assert evidence(model) == {"parameter of Linear": ["layers.*.weight"], "parameter of Conv1d": ["conv.weight"]}


@pytest.mark.parametrize("name", ["cos", "pe", "alibi", "fb", "window", "attn_mask", "running_mean", "mel_filters"])
def test_a_parameter_of_a_module_is_none_of_the_buffers_that_its_name_is_for_in_files(name):
    class Learned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_parameter(name, nn.Parameter(torch.randn(20, 24)))

    assert evidence(Learned()) == {"parameter of Learned": [name]}
    assert kappa_fast.rank(Learned())[0].key == name


def test_codes_are_weights_by_the_rule_of_their_format():
    codes = {"a.weight": torch.randn(32, 32).to(torch.float8_e4m3fn), "a.weight_scale_inv": torch.ones(1, 1)}
    found = evidence(codes | weights(b__weight=(32, 32)))
    assert found == {
        "codes in a known format: fp8 e4m3, one scale": ["a.weight"],
        "floats named 'weight', and no other tensor says otherwise": ["b.weight"],
    }


def test_a_pattern_stands_for_names_that_share_their_evidence_and_for_no_others():
    named = [("l.0.weight", "x"), ("l.1.weight", "y"), ("m.0.weight", "x"), ("m.1.weight", "x")]
    assert by_evidence(named) == {"x": ["l.0.weight", "m.*.weight"], "y": ["l.1.weight"]}


DAMAGED = {"a.weight": torch.randn(40, 32).to(torch.float8_e4m3fn), "a.weight_scale_inv": torch.ones(3, 7)}


def test_a_weight_that_cannot_be_read_ends_the_run_with_the_way_out():
    with pytest.raises(kappa_fast.SourceError, match=r"exclude='a\\.weight'|exclude='a\.weight'"):
        kappa_fast.rank(DAMAGED | weights(b__weight=(32, 20)))


@pytest.mark.parametrize("option", [{"exclude": "a.weight"}, {"include": "b"}])
def test_and_doing_so_works(option):
    source = open_source(DAMAGED | weights(b__weight=(32, 20)), Filters(**option))
    assert [m.name for m in source.matrices] == ["b.weight"]
    assert {s.name for s in source.skipped} == {"a.weight", "a.weight_scale_inv"}
    assert source.num_parameters == 40 * 32 + 32 * 20
