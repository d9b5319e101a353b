"""A small language model and text for it, both from what is on the machine: a config of transformers, and docstrings.

The model begins at random, so what it learns is how docstrings are spelled; the steps are those of a real model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from task import docstrings

LENGTH = 64  # tokens of a text: bytes


def tokenizer() -> Any:
    """One token for each byte, and one for the end."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate([*letters, "<end>"])}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", pad_token="<end>")


def small_llama() -> Any:
    """Four layers, a quarter of a million weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
        bos_token_id=256,
        eos_token_id=256,
    )
    return LlamaForCausalLM(config)


def texts(count: int = 800) -> tuple[list[str], list[str]]:
    """Texts to train on, and others to test with."""
    found = [text for text, _ in docstrings() if len(text.encode()) >= LENGTH][:count]
    return [t for i, t in enumerate(found) if i % 8], [t for i, t in enumerate(found) if i % 8 == 0]


def blocks(lines: Sequence[str]) -> list[dict[str, torch.Tensor]]:
    """The beginning of each text as tokens and labels."""
    made = tokenizer()(list(lines), truncation=True, max_length=LENGTH, return_tensors="pt", padding=True)["input_ids"]
    return [{"input_ids": row, "labels": row} for row in made]


@torch.no_grad()
def loss(model: torch.nn.Module, lines: Sequence[str]) -> float:
    """Cross-entropy per byte, in nats."""
    model.eval()
    rows = torch.stack([row["input_ids"] for row in blocks(lines)]).to(next(model.parameters()).device)
    return float(model(input_ids=rows, labels=rows).loss)
