"""README.md does what it says: its Python runs, and the commands, options and files it names exist."""

from __future__ import annotations

import inspect
import re
import shlex
import shutil
from pathlib import Path

import pytest

import kappa_fast
from kappa_fast.cli import app
from kappa_fast.cli.demo import find_weights


@pytest.fixture(scope="module")
def readme(root) -> str:
    return (root / "README.md").read_text()


def python_blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.+?)^```", text, re.DOTALL | re.MULTILINE)


def test_every_python_example_runs_as_written(readme, run_python, tmp_path, root):
    examples = python_blocks(readme)
    assert len(examples) == 2
    ranked, trained = examples
    said = run_python(ranked, cwd=tmp_path, env={"PYTHONPATH": str(root)})
    assert "encoder.layer" in said
    assert len(kappa_fast.Ranking.from_json(tmp_path / "ranking.json")) == 37  # 39 in the demo, with two embeddings
    members = "optimizer.param_groups[0]['params'], model.parameters()"
    count = f"print(*(sum(map(torch.Tensor.numel, some)) for some in ({members})))"
    chosen, every = map(int, run_python(trained + count, cwd=tmp_path, env={"PYTHONPATH": str(root)}).split())
    assert 0 < chosen <= 0.5 * every


def test_the_options_table_lists_the_options_of_rank_with_their_defaults(readme):
    table = readme.partition("## Options of `rank`")[2].partition("\n\nThe command line")[0]
    listed = {}
    for names, defaults in re.findall(r"^\| (`.+?) \| (.+?) \|", table, re.MULTILINE):
        parts = re.findall(r"`(\w+)`", names)
        values = [eval(value) for value in defaults.split(", ")]
        listed |= dict(zip(parts, values * len(parts) if len(values) == 1 else values, strict=True))
    parameters = inspect.signature(kappa_fast.rank).parameters.items()
    reserved = {"source", "process_group"}
    assert listed == {name: parameter.default for name, parameter in parameters if name not in reserved}


def test_every_command_line_in_it_uses_options_that_exist(readme, capsys):
    lines = re.findall(r"^    kappa-fast (\w+)(.*)$", readme, re.MULTILINE)
    assert {command for command, _ in lines} == {"compare", "demo", "export", "plan", "rank", "report", "select"}
    for command, rest in lines:
        with pytest.raises(SystemExit):
            app([command, "--help"], prog_name="kappa-fast")
        shown = capsys.readouterr().out
        for option in re.findall(r"--[a-z-]+", rest):
            assert re.search(rf"^ +{option}\b", shown, re.MULTILINE), option


def test_its_commands_work_one_after_the_other(readme, tmp_path, monkeypatch, capsys):
    """On a real model; what was ranked before and after training stands for the two that are compared."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(find_weights(), "model.safetensors")
    commands = [shlex.split(line, comments=True) for line in re.findall(r"^    kappa-fast (.*)$", readme, re.MULTILINE)]
    commands = [command for command in commands if not {"org/name", "demo"} & set(command)]
    assert [command[0] for command in commands] == ["plan", "rank", "rank", "report", "select", "compare", "export"]
    for command in commands:
        given = ["model.safetensors" if word == "checkpoint/" else word for word in command]
        if command[0] == "compare":
            for name in ("before.json", "after.json"):
                shutil.copy("ranking.json", name)
        with pytest.raises(SystemExit) as stop:
            app(given, prog_name="kappa-fast")
        assert not stop.value.code, capsys.readouterr().err
    assert Path("ranking.html").stat().st_size > 10_000
    assert "unfrozen_parameters:" in capsys.readouterr().out


def test_every_make_target_in_it_exists(readme, root):
    makefile = (root / "Makefile").read_text()
    targets = re.findall(r"^    make ([\w-]+)", readme, re.MULTILINE)
    assert targets == ["demo", "test"]
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


@pytest.mark.parametrize(
    "document",
    [
        "README.md",
        "docs/design.md",
        "docs/numerics.md",
        "docs/kernels.md",
        "docs/training.md",
        "docs/quantized.md",
        "docs/reports.md",
        "docs/planning.md",
        "CONTRIBUTING.md",
        "docs/caching.md",
        "docs/checkpoints.md",
        "docs/security.md",
    ],
)
def test_every_local_link_leads_to_a_file(document, root):
    file = root / document
    links = re.findall(r"\]\((?!https?:)([^)#]+)", file.read_text())
    assert [link for link in links if not (file.parent / link).exists()] == []


def test_every_test_that_the_page_on_security_names_exists(root):
    named = set(re.findall(r"\b(?:test_\w+|mutants)\.py", (root / "docs" / "security.md").read_text()))
    assert len(named) >= 10
    assert [name for name in sorted(named) if not (root / "tests" / name).exists()] == []


def test_every_file_that_the_design_names_exists(root):
    named = set(re.findall(r"`([\w/]+(?:\.py|/))`", (root / "docs" / "design.md").read_text()))
    homes = (root, root / "kappa_fast")
    assert [name for name in sorted(named) if not any((home / name).exists() for home in homes)] == []
