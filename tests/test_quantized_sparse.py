"""Sparse weights of compressed-tensors: bits and values, laid out here one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from models import matrices, reasons
from packing import check, check_complete, saved, trained

from kappa_fast.errors import SourceError
from kappa_fast.sources import Filters, open_source


def bitmask(dense: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.packbits(dense != 0, axis=-1, bitorder="little"))


def two_of_four(weight: torch.Tensor) -> torch.Tensor:
    fours = weight.reshape(-1, 4)
    kept = torch.zeros_like(fours).scatter_(1, fours.abs().topk(2, 1).indices, 1.0)
    return (fours * kept).reshape(weight.shape)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("columns", [96, 100])
def test_two_of_four(dtype, columns, tmp_path):
    dense = two_of_four(trained(64, columns)).to(dtype)
    values = dense[dense != 0].reshape(64, columns // 2)
    stored = {
        "a.compressed": values,
        "a.bitmask": bitmask(dense.float().numpy()),
        "a.shape": torch.tensor([[64], [columns]]),
    }
    config = {"sparsity_config": {"format": "sparse-24-bitmask"}, "quant_method": "compressed-tensors"}
    for source in (stored, saved(tmp_path, stored, quantization_config=config)):
        ranking = check(source, {"a.weight": dense.double().numpy()})
        assert ranking["a.weight"].quantization == "sparse 2:4 (bitmask)"
        check_complete(stored, ranking)


def test_any_share_of_zeros():
    dense = trained(64, 90) * (torch.rand(64, 90) > 0.7)
    stored = {"a.compressed": dense[dense != 0], "a.bitmask": bitmask(dense.numpy()), "a.shape": torch.tensor([64, 90])}
    stored["a.row_offsets"] = torch.zeros(64, dtype=torch.int64)
    (entry,) = check(stored, {"a.weight": dense.double().numpy()})
    assert entry.quantization == "sparse (bitmask)"


def test_sparse_and_quantized_is_skipped_whole():
    source = {"a.compressed": torch.randn(64, 48).to(torch.float8_e4m3fn), "a.shape": torch.tensor([64, 96])}
    source |= {"a.bitmask": torch.zeros(64, 12, dtype=torch.uint8), "a.weight_scale": torch.ones(64, 1)}
    assert matrices(source) == {}
    assert reasons(source)["a.bitmask"].startswith("sparse and quantized")


def test_bits_and_values_that_do_not_fit_are_refused():
    dense = two_of_four(trained(64, 96))
    good = {"a.compressed": dense[dense != 0], "a.bitmask": bitmask(dense.numpy()), "a.shape": torch.tensor([64, 96])}
    with pytest.raises(SourceError, match=r"it is \(64, 90\)|it is \(64, 128\)"):
        open_source(good | {"a.shape": torch.tensor([64, 128])}, Filters())
    with pytest.raises(SourceError, match="'shape' beside it is missing"):
        open_source({k: t for k, t in good.items() if k != "a.shape"}, Filters())
    with pytest.raises(SourceError, match="has bits for 3072 of 6144 weights, but there are 3000 values"):
        matrices(good | {"a.compressed": good["a.compressed"][:3000]})["a.weight"].load()
