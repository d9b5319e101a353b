"""Importing kappa_fast is cheap, and what it offers is what was agreed on."""

import json

import safetensors.torch
import torch

import kappa_fast

PUBLIC_NAMES = [
    "plan",
    "rank",
    "wrap",
    "restore",
    "difference",
    "Plan",
    "Progress",
    "Ranking",
    "TensorKappa",
    "Skipped",
    "Comparison",
    "Difference",
    "Selection",
    "Handle",
    "SelectiveFineTuningOptimizer",
    "get_kappa_lora_config",
    "get_kappatune_lora_model",
    "KappaError",
    "OptionError",
    "SourceError",
    "SourceNotFoundError",
    "ShardedError",
    "RankingFileError",
    "BackendError",
    "ComputeError",
    "ProcessGroupError",
    "MissingExtraError",
    "Interrupted",
    "__version__",
]

HEAVY_OR_OPTIONAL = {
    "gguf",
    "huggingface_hub",
    "jinja2",
    "matplotlib",
    "pandas",
    "peft",
    "rich",
    "scipy",
    "transformers",
    "triton",
    "typer",
}

# torch comes first, so that only what kappa_fast adds to it is counted.
IMPORT_AFTER_TORCH = """
import json, sys, time
import torch
before, start = set(sys.modules), time.process_time()
import kappa_fast
kappa_fast.rank, kappa_fast.Selection  # what is public is loaded on first use
seconds = time.process_time() - start
print(json.dumps({"seconds": seconds, "added": sorted({m.partition(".")[0] for m in set(sys.modules) - before})}))
"""


def test_the_public_names_are_these_in_the_order_of_the_pipeline():
    assert kappa_fast.__all__ == PUBLIC_NAMES


def test_every_public_name_exists_and_is_listed_by_dir():
    assert set(PUBLIC_NAMES) <= set(dir(kappa_fast))
    assert [name for name in PUBLIC_NAMES if not hasattr(kappa_fast, name)] == []


def test_what_public_functions_return_is_public_itself():
    model = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Linear(32, 32))
    told: list[kappa_fast.Progress] = []
    ranking = kappa_fast.rank(model, progress=told.append)
    assert type(told[0]) is kappa_fast.Progress
    assert type(kappa_fast.plan(model)) is kappa_fast.Plan
    assert type(ranking.compare(ranking)) is kappa_fast.Comparison
    assert type(kappa_fast.difference(model, model)) is kappa_fast.Difference
    with ranking.select(num_tensors=1).apply(model) as handle:
        assert type(handle) is kappa_fast.Handle


def test_an_unknown_name_is_an_attribute_error():
    assert not hasattr(kappa_fast, "no_such_name")


def test_importing_takes_under_a_second_beyond_torch_and_loads_no_optional_package(run_python, root):
    for _ in range(3):  # the least of three: a busy machine may be slow once
        report = json.loads(run_python(IMPORT_AFTER_TORCH, cwd=root))
        assert HEAVY_OR_OPTIONAL.isdisjoint(report["added"])
        if report["seconds"] < 1.0:
            break
    assert report["seconds"] < 1.0


# What ranking a checkpoint has no use for; each would be found here the day that something imports it after all.
UNUSED = {
    *HEAVY_OR_OPTIONAL - {"rich", "typer"},  # a command is made with typer, and its table with rich
    *("accelerate", "numba", "sklearn", "torchao", "tqdm", "urllib3"),
    *("torch._dynamo", "torch._inductor", "torch.onnx", "torch.utils.data", "torch.utils.tensorboard"),
    *(f"kappa_fast.{room}" for room in ("distributed", "integrations", "kernels", "planning", "training")),
    *(f"kappa_fast.report.{file}" for file in ("notebook", "page", "plot")),
}

COMMAND = """
import json, sys
import torch
before = set(sys.modules)
from kappa_fast.cli import main
sys.argv = ["kappa-fast", "rank", "model.safetensors", "--no-cache", "--quiet", "--json", "ranking.json"]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
print(json.dumps(sorted(set(sys.modules) - before)))
"""


def test_the_command_rank_loads_nothing_that_it_does_not_use(run_python, root, tmp_path):
    safetensors.torch.save_file({"layers.0.weight": torch.eye(32)}, tmp_path / "model.safetensors")
    added = json.loads(run_python(COMMAND, cwd=tmp_path, env={"PYTHONPATH": str(root)}).splitlines()[-1])
    assert "kappa_fast.pipeline" in added  # the command has done its work in that process
    assert [name for name in added if any(f"{name}.".startswith(f"{unused}.") for unused in UNUSED)] == []


def test_the_command_line_shows_its_help_without_torch(run_python, root):
    code = "import sys; from kappa_fast.cli import app; print('torch' in sys.modules, 'numpy' in sys.modules)"
    assert run_python(code, cwd=root).split() == ["False", "False"]
