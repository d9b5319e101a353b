"""Weights that a file holds in parts are those that the module multiplies with."""

from __future__ import annotations

import warnings

import pytest
import torch
from models import EVERYTHING, matrices, reasons
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from kappa_fast.sources import open_source


def old_weight_norm(layer: nn.Module, dim: int | None = 0) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(layer, dim=dim)


def old_spectral_norm(layer: nn.Module) -> nn.Module:
    nn.utils.spectral_norm(layer)
    layer(torch.randn(1, *((layer.in_channels, 9, 9) if isinstance(layer, nn.Conv2d) else (layer.in_features,))))
    return layer.eval()


def pruned(layer: nn.Module) -> nn.Module:
    return prune.l1_unstructured(layer, "weight", amount=0.6)


def both(layer: nn.Module) -> nn.Module:
    return prune.l1_unstructured(old_weight_norm(layer), "weight_v", amount=0.3)


MADE = {
    "weight norm": lambda: old_weight_norm(nn.Linear(40, 30)),
    "weight norm along columns": lambda: old_weight_norm(nn.Linear(40, 30), 1),
    "weight norm of all": lambda: old_weight_norm(nn.Linear(40, 30), None),
    "weight norm of a convolution": lambda: old_weight_norm(nn.Conv1d(20, 30, 3)),
    "weight norm of a transposed one": lambda: old_weight_norm(nn.ConvTranspose1d(20, 30, 3), 1),
    "weight norm, parametrized": lambda: parametrizations.weight_norm(nn.Linear(40, 30)),
    "weight norm, parametrized, columns": lambda: parametrizations.weight_norm(nn.Linear(40, 30), dim=1),
    "spectral norm": lambda: old_spectral_norm(nn.Linear(40, 30)),
    "spectral norm of a convolution": lambda: old_spectral_norm(nn.Conv2d(20, 30, 3)),
    "spectral norm, parametrized": lambda: parametrizations.spectral_norm(nn.Linear(40, 30)).eval(),
    "pruned": lambda: pruned(nn.Linear(40, 30)),
    "pruned convolution": lambda: pruned(nn.Conv2d(20, 30, 3)),
}


@pytest.mark.parametrize("how", MADE)
def test_the_parts_make_the_weight_of_the_module(how, tmp_path):
    torch.manual_seed(0)
    layer = MADE[how]()
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.dim() > 0:
                parameter.mul_(torch.linspace(1, 9, parameter.shape[0]).view(-1, *[1] * (parameter.dim() - 1)))
        if "spectral" in how:
            layer.eval()
        expected = (layer(torch.zeros(1, *_input(layer))), layer.weight.detach().clone())[1]
    state = {f"conv.{name}": tensor.contiguous() for name, tensor in layer.state_dict().items()}
    save_file(state, tmp_path / "m.safetensors")
    for source in (state, tmp_path / "m.safetensors"):
        opened = open_source(source, EVERYTHING)
        found = {m.name: m for m in opened.matrices}
        assert set(found) >= {"conv.weight"}
        assert torch.equal(found["conv.weight"].load().reshape(-1), expected.reshape(-1))
        assert not any("weight" in name for name in found.keys() - {"conv.weight"})
        assert opened.num_parameters == sum(p.numel() for p in layer.parameters())
        assert any("computed as torch does" in evidence for evidence in opened.metadata["evidence"])


def _input(layer: nn.Module) -> tuple[int, ...]:
    return {nn.Linear: (40,), nn.Conv1d: (20, 9), nn.ConvTranspose1d: (20, 9), nn.Conv2d: (20, 9, 9)}[
        next(c for c in type(layer).__mro__ if c in (nn.Linear, nn.Conv1d, nn.ConvTranspose1d, nn.Conv2d))
    ]


def test_a_pruned_direction_of_weight_norm_is_both():
    layer = both(nn.Linear(40, 30))
    layer(torch.zeros(1, 40))
    (found,) = matrices(layer.state_dict()).values()
    layer(torch.zeros(1, 40))
    assert found.name == "weight"
    assert torch.equal(found.load(), layer.weight)


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2 + weight.tril()


def test_what_an_unknown_class_computes_is_left_out_by_name():
    layer = nn.Linear(40, 30)
    parametrize.register_parametrization(layer, "weight", Halved())
    assert matrices(layer.state_dict()) == {}
    (reason,) = reasons(layer.state_dict()).values()
    assert reason.endswith("a file does not say what computes the weight: rank the model")
    orthogonal = parametrizations.orthogonal(nn.Linear(40, 30), use_trivialization=True)
    assert matrices(orthogonal.state_dict()) == {}


def test_a_mask_beside_a_weight_is_applied_and_scores_leave_both_out():
    weight, mask = torch.randn(40, 30), torch.rand(40, 30) > 0.4
    (found,) = matrices({"a.weight": weight, "a.mask": mask}).values()
    assert torch.equal(found.load(), weight * mask)
    scored = {"a.weight": weight, "a.mask_scores": torch.rand(40, 30)}
    assert matrices(scored) == {}
    assert "by a rule that a file does not contain" in reasons(scored)["a.weight"]


def test_a_weight_that_is_there_whole_and_in_parts_is_refused():
    state = dict(pruned(nn.Linear(40, 30)).state_dict()) | {"weight": torch.randn(30, 40)}
    with pytest.raises(Exception, match=r"'weight' is stored twice, as a whole and in parts \('weight_orig'\)"):
        open_source(state, EVERYTHING)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module."])
def test_the_prefixes_of_wrappers_change_nothing(prefix):
    layer = old_spectral_norm(nn.Linear(40, 30))
    state = {f"{prefix}a.{name}": tensor for name, tensor in layer.state_dict().items()}
    found = matrices(state | {f"{prefix}b.weight": torch.randn(30, 40)})
    assert set(found) == {"a.weight", "b.weight"}
    assert torch.equal(found["a.weight"].load(), layer.weight)
