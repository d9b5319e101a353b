"""Files of optimum-quanto in eight bits, held to what the library makes of them."""

from __future__ import annotations

import json

import pytest
import torch
from models import matrices
from safetensors.torch import save_file
from torch import nn

import kappa_fast
from kappa_fast.errors import SourceError

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["qint8", "qfloat8", "qfloat8_e5m2", "qfloat8_e4m3fnuz"])
def test_what_quanto_saves_in_eight_bits_is_what_it_dequantizes_to(kind, dtype, tmp_path):
    package = pytest.importorskip("optimum.quanto")
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 48), nn.Linear(48, 20, bias=False)).to(dtype)
    package.quantize(made, weights=getattr(package, kind), exclude="2")
    package.freeze(made)
    state = {name: tensor.contiguous() for name, tensor in made.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "quanto_qmap.json").write_text(json.dumps(package.quantization_map(made)))
    live = kappa_fast.rank(made, progress=False)
    for source in (tmp_path, state):
        found = matrices(source)
        assert set(found) == {f"{i}.weight" for i in range(3)}
        for place in range(2):
            assert torch.equal(found[f"{place}.weight"].load(), made[place].weight.dequantize())
        ranking = kappa_fast.rank(source, progress=False)
        assert {e.key: (e.kappa, e.dtype) for e in ranking} == {e.key: (e.kappa, e.dtype) for e in live}
        assert ranking.metadata["num_parameters"] == live.metadata["num_parameters"]


def test_what_quanto_saves_otherwise_is_skipped_or_refused_by_name():
    state = {"a.weight._data": torch.ones(32, 24, dtype=torch.int8), "a.weight._scale": torch.ones(32, 1)}
    for wrong in (torch.ones(1, 24), torch.ones(32, 2), torch.ones(32, 1, dtype=torch.int32)):
        with pytest.raises(SourceError, match=r"one for each row, are expected.* exclude='a\.weight'"):
            kappa_fast.rank(state | {"a.weight._scale": wrong, "b": torch.randn(20, 20)}, progress=False)
    with pytest.raises(SourceError, match=r"'weight\._scale' beside it is missing"):
        kappa_fast.rank({"a.weight._data": state["a.weight._data"]}, progress=False)
    nibbles = {"a.weight._data._data": torch.ones(16, 24, dtype=torch.uint8), "a.weight._shift": torch.ones(32, 1)}
    nibbles |= {"a.weight._scale": torch.ones(32, 1)}
    kernels = {"a.weight._data": torch.ones(32, 8, 3, 3, dtype=torch.int8), "a.weight._scale": torch.ones(32, 1, 1, 1)}
    for left, why in ((nibbles, "with fewer than eight bits"), (kernels, "for a convolution")):
        ranking = kappa_fast.rank(left | {"b": torch.randn(20, 20)}, progress=False)
        assert [e.name for e in ranking] == ["b"]
        assert any(why in s.reason for s in ranking.skipped)
