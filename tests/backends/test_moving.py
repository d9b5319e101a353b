"""Small tensors on their way to a device: what they hold, and that what is kept is kept for one stream."""

import pytest
import torch

from kappa_fast.backends import moving

CPU = torch.device("cpu")


def test_picking_gives_rows_and_copies_nothing_for_all():
    values = torch.arange(12.0).reshape(4, 3)
    assert moving.pick(values, [0, 1, 2, 3]) is values
    assert torch.equal(moving.pick(values, [1, 3]), values[[1, 3]])
    assert moving.pick(values, []).shape == (0, 3)
    flags = torch.tensor([True, False, True])
    assert moving.pick(flags, [1, 2]).tolist() == [False, True]


def test_numbers_arrive_as_they_are():
    assert moving.on_device([1 / 3, 1e300], CPU).tolist() == [1 / 3, 1e300]
    assert moving.on_device([[1.0, 2.0], [3.0, 4.0]], CPU).shape == (2, 2)
    assert moving.places((2, 0), CPU).tolist() == [2, 0]
    assert moving.constants((0.1, 0.2), CPU).dtype == torch.float64


@pytest.mark.parametrize("kept", [lambda: moving.places((5, 7), CPU), lambda: moving.constants((0.5,), CPU)])
def test_another_stream_gets_a_tensor_of_its_own(kept, monkeypatch):
    first = kept()
    assert kept() is first
    monkeypatch.setattr(moving, "stream_of", lambda _: 7)
    other = kept()
    assert other is not first
    assert kept() is other


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "meta", "xpu"])
def test_every_device_but_the_cpu_is_accelerated(device):
    assert moving.accelerated(torch.device(device))
    assert not moving.accelerated(CPU)
