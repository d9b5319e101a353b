"""Published runs work at toy size, with controls of the same size, and the entries for PEFT's comparison load there."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build

from benchmarks.forgetting import example, metamath, published
from benchmarks.forgetting import published_methods as methods

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
NAMES = sorted(file.stem for file in published.CONFIGS.glob("*.json"))
MODELS = {
    "peft-mixtral-gsm8k": "mixtral",
    "peft-llama-imdb": "llama",
    "reference-deepseek-imdb": "deepseek_v3",
    "reference-olmoe-irony": "olmoe",
}
ROWS = {
    "gsm8k": {"question": "What is one and {i}?", "answer": "It is {i} more."},
    "imdb": {"text": "A film that I saw {i} times.", "label": 1},
    "tweet_eval": {"text": "Great, rain for {i} days.", "label": 0},
    "wikitext": {"text": "The river is {i} kilometres long and runs to the sea."},
}


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, Path]:
    """A tiny model of each family with a tokenizer, and a file in place of each data set."""
    folder = tmp_path_factory.mktemp("published")
    coder = example.tokenizer()
    for family in set(MODELS.values()):
        build(family, vocab_size=len(coder), num_hidden_layers=3).save_pretrained(folder / family)
        coder.save_pretrained(folder / family)
    for name, row in ROWS.items():
        lines = [{k: v.format(i=i) if isinstance(v, str) else v for k, v in row.items()} for i in range(20)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return {file.stem if file.suffix else file.name: file for file in folder.iterdir()}


def toy(name: str, places: dict[str, Path]) -> dict[str, Any]:
    """The config with a model and rows of this machine, few steps, and without nf4, which needs a GPU."""
    config = published.read(name)
    for part in ("learn", "keep"):
        data = config[part]["dataset"][0].rpartition("/")[2]
        config[part] |= {"file": str(places[data]), "length": 24}
    config["training"] |= {"batch": 6, "accumulate": min(2, config["training"]["accumulate"]), "epochs": 1, "lr": 0.01}
    for method in config["methods"].values():
        method.pop("epochs", None)
        method |= {"r": min(8, method["r"])} if "r" in method else {}
        if "weights" in method:
            method["weights"] = method["weights"] | {"num_tensors": 20}
        if method.get("adapt", {}).get("top_p", 1.0) < 1:  # of few matrices a share leaves random draws no choice
            method["adapt"] = method["adapt"] | {"top_p": 0.5}
    return config | {"model": str(places[MODELS[name]]), "quantization": None, "seeds": [0]}


@pytest.mark.parametrize(
    "name", [n if n == "peft-llama-imdb" else pytest.param(n, marks=pytest.mark.slow) for n in NAMES]
)
def test_a_published_run_and_its_controls_work_at_toy_size(name, places, tmp_path):
    config = toy(name, places)
    for method in config["methods"].values():
        if "draws" in method:
            method["draws"] = 1
    assert published.run(config, tmp_path) == 0
    before = (tmp_path / "journal.jsonl").read_text()
    assert published.run(config, tmp_path) == 0
    assert (tmp_path / "journal.jsonl").read_text() == before
    records = {record["method"]: record for record in map(json.loads, before.splitlines())}
    assert set(records) == set(config["methods"])
    base = records.pop("baseline")
    assert base["steps"] == 0
    for record in records.values():
        assert record["steps"] > 0
        assert record["loss"]["train"] < base["loss"]["train"], record["method"]
        assert math.isfinite(record["perplexity"]["keep"])
    trained = {method: record["said"]["trained"] for method, record in records.items()}
    assert trained["random"] == trained["kappatune"]  # the same shapes
    if "weights" not in config["methods"]["kappatune"]:
        for other in ("kappa-highest", "first-layers", "last-layers"):
            assert trained[other] == pytest.approx(trained["kappatune"], rel=0.35), other  # a rank is a whole number
    page = published.report(config, tmp_path)
    assert all(f"| {method} |" in page for method in config["methods"])


@pytest.mark.parametrize("name", NAMES)
def test_every_config_has_what_the_published_run_lacked(name):
    config = published.read(name)
    assert config["source"].startswith("https://github.com/")
    assert len(config["seeds"]) == 3
    assert {"baseline", "kappatune", "kappa-highest", "random", "first-layers", "last-layers"} <= set(config["methods"])
    assert config["methods"]["random"]["draws"] >= 3
    every = list(published.jobs(config))
    assert len({job["id"] for job in every}) == len(every)
    assert sum(job["method"] == "random" for job in every) == 9
    assert sum(job["method"] == "baseline" for job in every) == 1


def test_the_lora_of_the_mixtral_run_has_the_published_number_of_parameters_on_attention_alone():
    transformers = pytest.importorskip("transformers")
    config = published.read("peft-mixtral-gsm8k")
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.MixtralConfig())  # Mixtral-8x7B
        adapted = methods._wrapped(model, methods._of_modules(model, config["methods"]["lora-global"]))
    trained = {name: p.numel() for name, p in adapted.named_parameters() if p.requires_grad}
    assert sum(trained.values()) == 218_103_808
    assert all(".self_attn." in name for name in trained)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_controls_are_what_they_say(family):
    model = build(family, num_hidden_layers=4)
    ranking = methods.candidates(model)
    low, high, first = (
        methods.adapted(ranking, {"top_p": 0.35, **more}, 0) for more in ({}, {"order": "highest"}, {"by": "layer"})
    )
    drawn = [methods.adapted(ranking, {"top_p": 0.35, "order": "random", "match": ["type"]}, draw) for draw in range(6)]

    def types(selection: Any) -> Counter[Any]:
        return Counter((e.group, e.shape) for e in selection)

    assert all(types(one) == types(low) for one in drawn)
    assert len({one.keys for one in drawn}) > 2
    assert sum(e.kappa for e in low) < sum(e.kappa for e in high)
    linear = [e for e in first if not e.index]
    outside = [e for e in ranking if not e.index and e.key not in first.keys]
    assert max(e.layer for e in linear) <= min(e.layer for e in outside)
    if family == "mixtral":
        assert any(e.index for e in low), "fused experts have a share of their own"


def test_the_lowest_are_those_of_pefts_selector():
    from kappa_fast.integrations.peft import find_kappa_target_modules

    model = build("llama", num_hidden_layers=4)
    chosen = methods.adapted(methods.candidates(model), {"top_p": 0.2}, 0)
    expected = find_kappa_target_modules(model.model, top_p=0.2, show_progress=False)["target_modules"]
    assert {name.removesuffix(".weight") for name in chosen.names} == {f"model.{name}" for name in expected}


def test_losses_and_labels_leave_padding_out_and_perplexity_is_that_of_few_batches():
    pad = 7
    batch = torch.tensor([[1, 2, 7, 3, 7, 7], [7, 7, 4, 5, 6, 1]])
    assert published.labels_of(batch, pad).tolist() == [[1, 2, -100, 3, -100, -100], [-100, -100, 4, 5, 6, 1]]
    assert published.labels_of(batch, pad, all_of_it=True).equal(batch)
    assert published._mask(batch, pad).tolist() == [[1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1]]
    model = build("llama")
    rows = [torch.randint(8, 60, (6,), generator=torch.Generator().manual_seed(i)) for i in range(6)]
    with torch.no_grad():
        whole = [float(model(input_ids=row[None], labels=row[None]).loss) for row in rows]
    assert published.loss_of(model, rows, pad) == pytest.approx(sum(whole) / 6, rel=1e-5)
    assert published.perplexity(model, rows, pad, most=2) == pytest.approx(math.exp(sum(whole[:4]) / 4), rel=1e-5)


def test_steps_and_learning_rates_are_those_of_the_published_log():
    """900 rows in batches of 40, four together: 240 steps, and after the fourth 2e-4 has become 1.9667e-4."""
    seen = []

    class Watched(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            seen.append(self.param_groups[0]["lr"])

    model = torch.nn.Linear(1, 1)
    prepared = methods.Prepared(model, Watched(model.parameters(), lr=1.0), list(model.parameters()))
    training = published.read("peft-mixtral-gsm8k")["training"]

    def flat(model: Any, batch: torch.Tensor, labels: torch.Tensor, pad: int) -> torch.Tensor:
        return (model.weight * 0).sum()

    original, published._loss = published._loss, flat
    try:
        curve = published.train(prepared, [torch.ones(4, dtype=torch.long)] * 900, training, 0, 7)
    finally:
        published._loss = original
    assert len(curve) == len(seen) == 240
    assert seen[4] == pytest.approx(1.9667e-4, rel=1e-4)


def test_nf4_without_a_gpu_is_refused(places, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="is published in nf4, which needs a GPU"):
        methods.opened(str(places["llama"]), "nf4")


def test_the_entries_for_metamath_load_there_and_have_its_number_of_parameters(tmp_path):
    peft = pytest.importorskip("peft")
    small = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=5)
    with pytest.raises(FileNotFoundError, match=r"has no default_training_params\.json"):
        metamath.write(build("llama", **small), "llama", tmp_path)
    (tmp_path / metamath.PARAMS).write_text("{}")
    written = metamath.write(build("llama", **small), "llama", tmp_path, draws=2)
    assert [file.name.removeprefix("llama-kappatune-") for file in written] == [
        *("lowest", "highest", "random-0", "random-1", "first-layers", "last-layers"),
    ]
    reference = peft.get_peft_model(
        build("llama", **small), peft.LoraConfig(r=metamath.RANK, target_modules=list(metamath.REFERENCE))
    )
    wanted = reference.get_nb_trainable_parameters()[0]
    targets = set()
    for folder in written:
        parts = folder.relative_to(tmp_path).parts  # run.py wants experiments/<method>/<name>
        assert len(parts) == 3
        assert parts[:2] == ("experiments", "lora")
        config = peft.PeftConfig.from_pretrained(folder)
        assert config.peft_type == "LORA"
        assert config.task_type == "CAUSAL_LM"
        assert config.lora_alpha == 2 * config.r
        model = peft.get_peft_model(build("llama", **small), config)
        assert model.get_nb_trainable_parameters()[0] == pytest.approx(wanted, rel=0.1)
        targets.add(str(config.target_modules))
    assert len(targets) >= 5


@pytest.mark.parametrize(
    ("main", "given", "message"),
    [
        (published.main, ["nosuch", "--folder", "x"], "'nosuch' is no config and no file of one: give one of peft-"),
        (metamath.main, ["/nowhere", "/nowhere"], "error: "),
    ],
    ids=["published", "metamath"],
)
def test_what_is_not_there_is_an_error_and_no_traceback(main, given, message, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["program", *given])
    with pytest.raises(SystemExit) as stop:
        main() if main is published.main else main(given)
    assert message in f"{stop.value} {capsys.readouterr().err}"
