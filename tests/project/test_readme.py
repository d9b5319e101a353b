"""README.md does what it says: its Python runs, and the targets and files that it and other documents name exist.

test_docs.py has its commands, and those of the pages in docs/.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from packing import minilm
from transformers import LlamaConfig, LlamaForCausalLM

import kappa_fast


@pytest.fixture(scope="module")
def readme(root) -> str:
    return (root / "README.md").read_text()


def python_blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.+?)^```", text, re.DOTALL | re.MULTILINE)


def test_the_first_example_trains_a_language_model_as_written(readme, run_python, tmp_path, root):
    """A small Llama in the folder org/name stands for a model of the hub, and random tokens for the reader's texts."""
    small = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=96)
    LlamaForCausalLM(LlamaConfig(**small)).save_pretrained(tmp_path / "org" / "name")
    texts = "import torch\ntokens = torch.randint(96, (8, 8))\n"
    texts += "dataset = [{'input_ids': row, 'labels': row} for row in tokens]\n"
    moved = """
before = AutoModelForCausalLM.from_pretrained("org/name").state_dict()
now = {name: value.cpu() for name, value in model.state_dict().items()}
print("moved:", *sorted(name for name, value in now.items() if not torch.equal(value, before[name])))
print("selected:", *sorted(selection.names))
"""
    example = python_blocks(readme)[0]
    said = run_python(texts + example + moved, cwd=tmp_path, env={"PYTHONPATH": str(root)})
    found = dict(re.findall(r"^(moved|selected): (.+)$", said, re.MULTILINE))
    assert found["moved"] == found["selected"]


def test_the_second_example_runs_as_written(readme, run_python, tmp_path, root):
    _, trained = python_blocks(readme)
    members = "optimizer.param_groups[0]['params'], model.parameters()"
    count = f"print(*(sum(map(torch.Tensor.numel, some)) for some in ({members})))"
    chosen, every = map(int, run_python(trained + count, cwd=tmp_path, env={"PYTHONPATH": str(root)}).split())
    assert 0 < chosen <= 0.5 * every


def test_the_rows_of_the_demo_are_what_it_prints_today(readme):
    """But for the last digits, which are the machine's."""
    weights = minilm()
    row = re.compile(r"^    (\S+) +(\d+)x(\d+) +([\d.]+) +([\d.]+) \.\. ([\d.]+) +([\d.]+) +(\S+)$", re.MULTILINE)
    found = row.findall(readme)
    assert len(found) == 3
    chosen = {name: weights[f"{name}.weight"] for name, *_ in found}
    ranking = kappa_fast.rank(chosen, embeddings=True, progress=False)
    for name, rows, columns, *numbers in found:
        kappa, lower, upper, exact, error = map(float, numbers)
        entry = ranking[name]
        assert entry.shape == (int(rows), int(columns))
        assert (kappa, lower, upper) == pytest.approx((entry.kappa, entry.lower, entry.upper), rel=2e-5)
        sigmas = torch.linalg.svdvals(chosen[name].double())
        assert exact == pytest.approx(float(sigmas[0] / sigmas[-1]), rel=2e-5)
        assert error <= 1e-5


def test_the_first_example_fits_on_a_screen(readme):
    """Ten lines of a fine-tuner's own, beside imports."""
    lines = [line for line in python_blocks(readme)[0].splitlines() if line and "import" not in line]
    assert len(lines) <= 10


def test_every_make_target_in_it_exists(readme, root):
    makefile = (root / "Makefile").read_text()
    targets = re.findall(r"^    make ([\w-]+)", readme, re.MULTILINE)
    assert targets == ["demo", "test"]
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def documents() -> list[Path]:
    root = Path(__file__).parents[2]
    return [root / "README.md", root / "CONTRIBUTING.md", *sorted((root / "docs").glob("*.md"))]


@pytest.mark.parametrize("file", documents(), ids=lambda file: file.name)
def test_every_local_link_leads_to_a_file(file):
    links = re.findall(r"\]\((?!https?:)([^)#]+)", file.read_text())
    assert [link for link in links if not (file.parent / link).exists()] == []


def test_every_test_that_the_page_on_security_names_exists(root):
    named = set(re.findall(r"\b(?:test_\w+|mutants)\.py", (root / "docs" / "security.md").read_text()))
    assert len(named) >= 10
    assert [name for name in sorted(named) if not list((root / "tests").rglob(name))] == []


def test_every_file_that_the_design_names_exists(root):
    named = set(re.findall(r"`([\w/]+(?:\.py|/))`", (root / "docs" / "design.md").read_text()))
    homes = (root, root / "kappa_fast")
    assert [name for name in sorted(named) if not any((home / name).exists() for home in homes)] == []
