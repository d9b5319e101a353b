"""The default budget keeps within what control groups and limits of the process leave."""

import json
import resource
import sys

import pytest
import torch

import kappa_fast
from kappa_fast.errors import ComputeError
from kappa_fast.execution import executor as execution
from kappa_fast.execution import waves
from kappa_fast.machine import memory

MIB = 1 << 20


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """An empty /proc/self and /sys/fs/cgroup; ``write(path, text)`` puts a file there."""
    monkeypatch.setattr(memory, "PROCESS", tmp_path / "proc")
    monkeypatch.setattr(memory, "MOUNTED", tmp_path / "cgroup")
    monkeypatch.setattr(memory, "_of_addresses", lambda: ())

    def write(path, text):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    return write


def second(write, folder, limit, used, inactive=0):
    write(f"cgroup/{folder}/memory.max", f"{limit}\n")
    write(f"cgroup/{folder}/memory.current", f"{used}\n")
    write(f"cgroup/{folder}/memory.stat", f"anon 1\ninactive_file {inactive}\nslab 3\n")


def test_without_groups_there_is_no_limit(groups):
    assert memory.headroom() is None
    groups("proc/cgroup", "0::/a\n")
    assert memory.headroom() is None


def test_what_the_own_group_leaves_counts_and_pages_of_files_are_given_back(groups):
    groups("proc/cgroup", "0::/a/b\n")
    second(groups, "a/b", 100 * MIB, 70 * MIB, 20 * MIB)
    assert memory.headroom() == 50 * MIB


def test_a_group_above_may_leave_less(groups):
    groups("proc/cgroup", "0::/a/b\n")
    second(groups, "a/b", "max", 10 * MIB)
    second(groups, "a", 30 * MIB, 25 * MIB)
    assert memory.headroom() == 5 * MIB


def test_in_a_container_the_mount_is_the_group(groups):
    groups("proc/cgroup", "0::/../outside/of/it\n")
    second(groups, ".", 64 * MIB, 80 * MIB)
    assert memory.headroom() == 0


def test_the_first_version_of_groups_is_read_too(groups):
    groups("proc/cgroup", "4:cpu:/x\n3:memory,hugetlb:/a\n0::/\n")
    groups("cgroup/memory/a/memory.limit_in_bytes", str(40 * MIB))
    groups("cgroup/memory/a/memory.usage_in_bytes", str(30 * MIB))
    groups("cgroup/memory/a/memory.stat", f"total_inactive_file {5 * MIB}\n")
    assert memory.headroom() == 15 * MIB


def test_damaged_files_say_nothing(groups):
    groups("proc/cgroup", "0::/a\n")
    second(groups, "a", "9" * 30, "x", "y")
    assert memory.headroom() is None


def test_the_default_budget_is_a_quarter_of_what_is_left(groups):
    groups("proc/cgroup", "0::/a\n")
    second(groups, "a", 100 * MIB, 60 * MIB)
    assert waves.default_budget(torch.device("cpu")) == 10 * MIB
    source = {f"l.{i}.w": torch.randn(40, 40) for i in range(4)}
    assert len(kappa_fast.rank(source, progress=False)) == 4
    second(groups, "a", 100, 100)  # nothing is left: matrix by matrix
    assert len(kappa_fast.rank(source, progress=False)) == 4


def test_what_a_machine_may_have_is_the_least_of_its_memory_and_the_groups(groups, monkeypatch):
    monkeypatch.setattr(memory.os, "sysconf", lambda name: {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 10_000}[name])
    assert memory.physical() == 4096 * 10_000
    groups("proc/cgroup", "0::/a\n")
    second(groups, "a", 10 * MIB, 0)
    assert memory.physical() == 10 * MIB


def test_a_matrix_of_a_file_that_no_memory_holds_is_refused_before_it_is_read(tmp_path, monkeypatch):
    """The file is a hole: it takes no room on the disk."""
    header = json.dumps({"l.0.w": {"dtype": "F32", "shape": [3000, 3000], "data_offsets": [0, 36_000_000]}}).encode()
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 36_000_000)
    monkeypatch.setattr(execution, "physical", lambda: 20 * MIB)
    with pytest.raises(ComputeError, match=r"'l\.0\.w' of shape \(3000, 3000\).* takes 36,000,000 bytes"):
        kappa_fast.rank(tmp_path, progress=False)
    assert len(kappa_fast.rank({"a": torch.randn(20, 20)}, progress=False)) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/statm")
def test_a_limit_of_the_address_space_counts(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1 << 50, 1 << 50))
    (left,) = memory._of_addresses()
    assert 0 < left < 1 << 50
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert list(memory._of_addresses()) == []
