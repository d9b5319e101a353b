"""Files of every kind give the same entries in whatever mode the caller has put torch."""

import json
import warnings

import pytest
import torch
from damaged_codes import FP8_TENSORS, SETS
from safetensors.torch import save_file
from undisturbed import MODES

import kappa_fast

ALL = {
    **MODES,
    "anomaly detection": torch.autograd.detect_anomaly,
    "default device of a thread": lambda: torch.device("meta"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A plain checkpoint, quantized ones, and a GGUF file."""
    root = tmp_path_factory.mktemp("files")
    plain = {"l.0.q.weight": torch.randn(40, 30), "l.1.q.weight": torch.randn(30, 40).bfloat16()}
    chosen = {"plain": (plain, {}), "fp8": (FP8_TENSORS, SETS[0][1])}
    for name, (tensors, config) in chosen.items():
        (root / name).mkdir()
        save_file({n: t.contiguous() for n, t in tensors.items()}, root / name / "model.safetensors")
        (root / name / "config.json").write_text(json.dumps({"quantization_config": config} if config else {}))
    gguf = pytest.importorskip("gguf")
    from gguf_files import write

    codes = gguf.quantize(torch.randn(64, 64).numpy(), gguf.GGMLQuantizationType.Q8_0)
    write(root / "m.gguf", {"blk.0.attn_q.weight": (codes, gguf.GGMLQuantizationType.Q8_0)})
    found = [*(root / name for name in chosen), root / "m.gguf"]
    return found, entries(found)


def entries(paths):
    return [list(kappa_fast.rank(path, progress=False)) for path in paths]


@pytest.mark.parametrize("mode", ALL)
def test_no_mode_changes_what_is_read_from_files(mode, folders):
    paths, expected = folders
    assert [len(found) for found in expected] == [2, 1, 1]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Anomaly Detection")
        with ALL[mode]():
            assert entries(paths) == expected
