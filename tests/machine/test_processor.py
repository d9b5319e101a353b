"""What is said of the processor."""

from __future__ import annotations

import pytest
import torch

from kappa_fast.machine import processor

LINES = "processor\t: 0\nvendor_id\t: {}\nmodel name\t: Some CPU\n\nprocessor\t: 1\nvendor_id\t: {}\n"


@pytest.fixture(autouse=True)
def _fresh():
    processor.mkl_is_narrow.cache_clear()
    yield
    processor.mkl_is_narrow.cache_clear()


@pytest.mark.parametrize(
    ("vendor", "capability", "mkl", "narrow"),
    [
        ("AuthenticAMD", "AVX512", True, True),
        ("AuthenticAMD", "AVX2", True, False),
        ("AuthenticAMD", "AVX512", False, False),
        ("GenuineIntel", "AVX512", True, False),
        ("", "AVX512", True, False),
    ],
)
def test_mkl_is_narrow_on_processors_of_amd_with_avx512(vendor, capability, mkl, narrow, tmp_path, monkeypatch):
    (tmp_path / "cpuinfo").write_text(LINES.format(vendor, vendor))
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    assert processor.mkl_is_narrow() is narrow


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe", b"nothing of the kind\n"])
def test_nothing_is_assumed_where_the_system_does_not_say(content, tmp_path, monkeypatch):
    if content is not None:
        (tmp_path / "cpuinfo").write_bytes(content)
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert processor.mkl_is_narrow() is False
