"""Names, reasons and kinds that would command a terminal come out of every command as what they are."""

import json

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import kappa_fast
from kappa_fast.cli import app

COMMAND = "\x1b]0;title\x07\x9b2J\u202e"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A checkpoint whose names have it, rankings of it, and one that has it in everything that is a text."""
    root = tmp_path_factory.mktemp("hostile")
    generator = torch.Generator().manual_seed(0)
    shapes = {f"layers.{i}.{COMMAND}.weight": (20, 20) for i in range(3)} | {f"e.{COMMAND}.embed.weight": (30, 20)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    (root / "m").mkdir()
    save_file(tensors, root / "m" / "model.safetensors")
    kappa_fast.rank(root / "m", progress=False).to_json(root / "a.json")
    fewer = {name: weight + 0.1 for name, weight in tensors.items() if "layers.1" not in name}
    kappa_fast.rank(fewer, progress=False).to_json(root / "b.json")
    raw = json.loads((root / "a.json").read_text())
    for entry in raw["entries"]:
        entry.update(dtype=COMMAND, method=COMMAND, quantization=COMMAND)
    for skipped in raw["skipped"]:
        skipped["reason"] = COMMAND
    raw["metadata"]["settings"]["fused"] = raw["metadata"]["source"]["model_type"] = COMMAND
    (root / "c.json").write_text(json.dumps(raw))
    return root


@pytest.mark.parametrize(
    "words",
    [
        "rank m",
        "rank m --debug --no-cache",
        f"rank m --exclude {COMMAND}",
        "plan m",
        "compare a.json b.json",
        "compare a.json c.json",
        "compare c.json b.json --debug",
        "export c.json --format names --num-tensors 2",
        "export c.json --format spectrum --num-tensors 2",
        "export c.json --format axolotl --max-params 1",
        "report c.json --max-params 1",
    ],
)
def test_no_command_hands_a_terminal_what_it_would_obey(words, files, monkeypatch):
    monkeypatch.chdir(files)
    found = CliRunner().invoke(app, words.split(" "))
    lines = (found.output + (found.stderr if found.stderr_bytes else "")).splitlines()
    assert [line for line in lines if not line.isprintable()] == []
    assert lines


def test_nor_does_any_text_of_a_ranking(files):
    ranking, other = (kappa_fast.Ranking.from_json(files / name) for name in ("c.json", "b.json"))
    selection = ranking.select(num_tensors=2)
    for text in (repr(ranking), str(ranking), repr(ranking[0]), repr(selection), str(ranking.compare(other))):
        assert [line for line in text.splitlines() if not line.isprintable()] == []
