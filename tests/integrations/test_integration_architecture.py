"""A config.json describes a model; whatever else it asks for is neither run, fetched, chosen nor asked about."""

import builtins
import json
import socket
import subprocess
import threading
import warnings

import pytest
import torch
from safetensors.torch import save_file

import kappa_fast
from kappa_fast.errors import SourceError
from kappa_fast.matching import architecture as module
from kappa_fast.matching.architecture import architecture

transformers = pytest.importorskip("transformers")
TEXT = dict(
    model_type="mixtral",
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_local_experts=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    vocab_size=32,
)
PLAIN = dict(TEXT, architectures=["MixtralForCausalLM"])
VISION = dict(
    model_type="clip_vision_model", hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
)
NESTED = dict(
    model_type="llava", architectures=["LlavaForConditionalGeneration"], text_config=TEXT, vision_config=VISION
)
CODE = {name: "other/repo--modeling.Evil" for name in ("AutoModel", "AutoConfig", "AutoModelForCausalLM")}


@pytest.fixture(autouse=True)
def asked(monkeypatch):
    """What was asked on a terminal."""
    questions = []
    monkeypatch.setattr(builtins, "input", lambda *text: questions.append(text) or "y")
    yield questions
    assert not questions


def changed(config, path, **settings):
    """A deep copy of the config with these settings at that place."""
    copy = json.loads(json.dumps(config))
    place = copy
    for key in path:
        place = place.setdefault(key, {})
    place.update(settings)
    return copy


@pytest.mark.parametrize("place", ["text_config", "vision_config"])
@pytest.mark.parametrize(
    "settings",
    [
        dict(auto_map=CODE),
        dict(attn_implementation="kernels-community/flash-attn"),
        dict(_attn_implementation="flash_attention_2"),
        dict(experts_implementation="other/experts"),
        dict(quantization_config=dict(quant_method="plugin", bits=4)),
        dict(tokenizer_class="EvilTokenizer", _name_or_path="other/repo", custom_generate="other/repo"),
        dict(dtype="no_such_dtype"),
    ],
)
def test_what_a_config_inside_of_a_config_chooses_is_not_followed(place, settings):
    model = architecture(changed(NESTED, [place], **settings))
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert model.config.text_config._attn_implementation == "eager"
    assert not hasattr(model.config.text_config, "auto_map")


def test_what_describes_a_part_of_the_model_stays():
    said = {"num_quantizers": 3, "audio_tokenizer_config": {"hidden_size": 4, "dtype": "x"}, "tokenizer_class": "Evil"}
    assert module._sanitized(said) == {"num_quantizers": 3, "audio_tokenizer_config": {"hidden_size": 4}}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_no_default_of_a_model_of_transformers_is_taken_for_a_choice():
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

    taken = set()
    for name in CONFIG_MAPPING_NAMES:
        try:
            config = CONFIG_MAPPING[name]().to_dict()
        except Exception:  # one that needs another package, or an argument
            continue
        taken |= config.keys() - module._sanitized(config).keys()
    assert taken <= {
        *("dtype", "torch_dtype", "_name_or_path", "name_or_path", "tokenizer_class", "use_pretrained_backbone"),
        *("use_timm_backbone", "_attn_implementation", "attn_implementation", "quantization_config"),
    }


def test_a_config_with_code_beside_it_at_the_top_builds_nothing():
    assert architecture(dict(PLAIN, auto_map=CODE)) is None


@pytest.mark.parametrize(
    "name",
    ["AutoModel", "PreTrainedModel", "pipeline", "TrainingArguments", "LlamaConfig", "models", "__doc__", 5, ["x"]],
)
def test_only_models_of_transformers_are_built(name):
    assert architecture(dict(PLAIN, architectures=[name])) is None


def test_what_the_user_has_registered_is_not_for_strangers_to_choose():
    class OwnConfig(transformers.LlamaConfig):
        model_type = "registered_here"

    transformers.AutoConfig.register("registered_here", OwnConfig)
    try:
        assert architecture(dict(PLAIN, model_type="registered_here", architectures=["LlamaForCausalLM"])) is None
    finally:
        del transformers.models.auto.configuration_auto.CONFIG_MAPPING._extra_content["registered_here"]


def test_a_model_that_is_built_for_its_names_reaches_no_network_and_no_process():
    reached = []

    def elsewhere():
        reached.append(subprocess.run(["true"]).returncode)

    with module._sealed():
        with pytest.raises(PermissionError):
            socket.create_connection(("localhost", 9))
        with pytest.raises(PermissionError):
            subprocess.run(["true"])
        other = threading.Thread(target=elsewhere)  # the user's other threads go on as they were
        other.start()
        other.join()
    assert subprocess.run(["true"]).returncode == 0
    assert reached == [0]


@pytest.mark.parametrize(
    ("path", "setting"),
    [
        ([], "num_hidden_layers"),
        ([], "num_local_experts"),
        (["text_config"], "num_hidden_layers"),
        (["text_config", "moe_config"], "n_layers"),
        (["encoder"], "depths"),
    ],
)
def test_a_count_that_no_model_has_is_an_error_that_names_it(path, setting):
    value = [2, 10**9] if setting == "depths" else 10**9
    field = ".".join([*path, setting])
    with pytest.raises(SourceError, match=rf"x\.json: {field} is 1,000,000,000, and more than 100,000"):
        architecture(changed(PLAIN, path, **{setting: value}), "x.json")


def test_labels_may_be_many_but_not_without_end():
    assert architecture(dict(PLAIN, num_labels=200_000)) is not None
    with pytest.raises(SourceError, match="num_labels is 1,000,000,000, and more than 1,048,576"):
        architecture(dict(PLAIN, num_labels=10**9))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_no_model_of_transformers_has_a_count_near_the_limits(monkeypatch):
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

    monkeypatch.setattr(module, "MOST_COUNTED", 20_000)
    checked = 0
    for name in CONFIG_MAPPING_NAMES:
        try:
            config = CONFIG_MAPPING[name]().to_dict()
        except Exception:  # one that needs another package, or an argument
            continue
        module._check_counts(config, name)
        checked += 1
    assert checked > 300


def test_large_numbers_that_count_nothing_are_fine():
    large = dict(max_position_embeddings=10**7, vocab_size=10**6, bos_token_id=200_000, label2id={"layers": 10**9})
    assert architecture({**PLAIN, **large, "vocabulary_map": {"num_layers": 10**9}}) is not None


def test_counts_that_multiply_end_at_the_number_of_modules(monkeypatch):
    monkeypatch.setattr(module, "MOST_MODULES", 100)
    with pytest.raises(SourceError, match=r"number of modules .* is 101, and more than 100"):
        architecture(dict(PLAIN, num_hidden_layers=1000))
    assert architecture(PLAIN) is not None
    torch.nn.Sequential(*(torch.nn.Identity() for _ in range(200)))  # nobody else is counted


def test_a_checkpoint_with_such_a_config_is_refused_by_name(tmp_path):
    save_file(
        {"model.layers.0.block_sparse_moe.experts.0.w1.weight": torch.randn(16, 16)}, tmp_path / "model.safetensors"
    )
    (tmp_path / "config.json").write_text(json.dumps(dict(PLAIN, num_hidden_layers=10**7)))
    with pytest.raises(SourceError, match=r"config\.json.*num_hidden_layers is 10,000,000"):
        kappa_fast.rank(tmp_path, progress=False)


def test_two_threads_that_build_at_once_leave_the_filters_of_warnings_alone():
    before = list(warnings.filters)
    threads = [threading.Thread(target=architecture, args=(PLAIN,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert warnings.filters == before
