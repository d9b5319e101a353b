"""Ranks on two machines, which network namespaces stand for: each has an address of its own, and no other way there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from ranks import Host, on_ranks
from safetensors.torch import save_file
from sharding import Net, fully_sharded, mesh, passed
from test_distributed import rank_checkpoint, rank_modules

import kappa_fast

distributed = pytest.importorskip("torch.distributed")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not distributed.is_available(), reason="this torch has no torch.distributed"),
    pytest.mark.skipif(sys.platform != "linux", reason="only Linux has network namespaces"),
]

SIZES = [1, 2, 3, 4]


def ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise PermissionError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[Host]]:
    """Two, with a cable between them. Nothing else of this machine can be reached from there."""
    if shutil.which("ip") is None:
        pytest.skip("there is no program ip (iproute2), which makes network namespaces")
    number = os.getpid() % 100_000
    made = [Host(f"kappa{side}{number}", f"k{side}{number}", f"10.77.0.{n}") for n, side in enumerate("ab", 1)]
    try:
        try:
            for host in made:
                ip("netns", "add", host.namespace)
            ip("link", "add", made[0].interface, "type", "veth", "peer", "name", made[1].interface)
            for host in made:
                ip("link", "set", host.interface, "netns", host.namespace)
                inside = ("-n", host.namespace)
                ip(*inside, "addr", "add", f"{host.address}/24", "dev", host.interface)
                ip(*inside, "link", "set", host.interface, "up")
                ip(*inside, "link", "set", "lo", "up")
        except PermissionError as error:
            pytest.skip(f"network namespaces cannot be made here, which takes root: {error}")
        yield made
    finally:
        for host in made:
            subprocess.run(["ip", "netns", "delete", host.namespace], capture_output=True, check=False)


def dense(folder: Path) -> Path:
    """A checkpoint in two files, with shapes that differ."""
    generator = torch.Generator().manual_seed(0)
    for part in range(2):
        found = {
            f"model.layers.{2 * part + i}.{name}.weight": torch.randn(shape, generator=generator).bfloat16()
            for i in range(2)
            for name, shape in (
                ("self_attn.q_proj", (96, 96)),
                ("mlp.up_proj", (160, 96)),
                ("mlp.down_proj", (96, 160)),
            )
        }
        save_file(found, folder / f"model-0000{part + 1}-of-00002.safetensors")
    return folder


def mixture(folder: Path) -> Path:
    """A checkpoint with experts one by one and a router."""
    generator = torch.Generator().manual_seed(1)
    shapes = {"gate_proj": (64, 96), "up_proj": (64, 96), "down_proj": (96, 64)}
    found = {
        f"model.layers.{layer}.mlp.experts.{expert}.{name}.weight": torch.randn(shape, generator=generator)
        for layer in range(2)
        for expert in range(5)
        for name, shape in shapes.items()
    }
    found |= {f"model.layers.{n}.mlp.gate.weight": torch.randn(20, 96, generator=generator) for n in range(2)}
    save_file(found, folder / "model.safetensors")
    return folder


def addresses(rank):
    """What the other ranks are told, with and without the variable that names the interface."""
    from kappa_fast.distributed.ranks import _store_of
    from kappa_fast.distributed.transfer import own_address

    store = _store_of(torch.distributed.group.WORLD)
    named = own_address(store)
    os.environ.pop("GLOO_SOCKET_IFNAME")
    assert own_address(store) == named
    return named[0]


def shards(rank):
    """Pieces of weights cross from one machine to the other."""
    world = torch.distributed.get_world_size()
    expected = kappa_fast.rank(Net())
    for named in (True, False):
        if not named:
            os.environ.pop("GLOO_SOCKET_IFNAME")
        model = fully_sharded(Net(), mesh(world))
        found = kappa_fast.rank(model, process_group=torch.distributed.group.WORLD)
        assert list(map(repr, found)) == list(map(repr, expected))
        if world > 1:
            assert all(each["gathered"] for each in found.metadata["ranks"])


def test_ranks_tell_each_other_the_address_of_their_machine(hosts):
    outcomes = on_ranks(3, addresses, hosts=hosts)
    passed(outcomes)
    assert [outcome.value for outcome in outcomes] == [hosts[0].address, hosts[1].address, hosts[0].address]


@pytest.mark.parametrize("size", SIZES)
def test_a_module_is_ranked_as_on_one_process(hosts, size):
    passed(on_ranks(size, rank_modules, hosts=hosts))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("make", [dense, mixture])
def test_a_checkpoint_is_ranked_as_on_one_process_cold_and_with_a_cache(hosts, tmp_path, make, size):
    source = tmp_path / "model"
    source.mkdir()
    passed(on_ranks(size, rank_checkpoint, make(source), tmp_path / "cache", hosts=hosts))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_a_sharded_model_is_ranked_as_the_whole_one(hosts, size):
    passed(on_ranks(size, shards, hosts=hosts))
