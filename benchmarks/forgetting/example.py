"""A worked example for own.py: a small Llama with a tokenizer, trained for a moment, and texts for it.

    python -m benchmarks.forgetting.example DIR              # 4 million parameters, about half an hour of a core
    python -m benchmarks.forgetting.example DIR --tiny       # for a test, seconds

DIR/model is a model like those of the hub, DIR/keep.txt what it was trained on and knows, DIR/learn-*.txt what it does
not. The command that asks about it is printed in the end.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import bases, texts

SIZES: dict[str, dict[str, Any]] = {
    "small": dict(hidden_size=192, intermediate_size=512, num_hidden_layers=8, num_attention_heads=6),
    "tiny": dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4),
}
OLD, NEW = {"small": "python", "tiny": "made-a"}, {"small": "headers", "tiny": "made-b"}
MOST = 3_000_000  # characters of a text


def tokenizer() -> Any:
    """One token for each byte, and an end: as little as a tokenizer can be."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {letter: number for number, letter in enumerate([*alphabet, "<end>"])}
    made = Tokenizer(models.BPE(vocab=words, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>")


def make(folder: Path, size: str = "small", steps: int = 3000, length: int = 96, batch: int = 16) -> Path:
    """Writes the model and the texts; returns the folder of the model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    coder = tokenizer()
    files = {name: folder / f"{name}.txt" for name in ("keep", "learn")}
    folder.mkdir(parents=True, exist_ok=True)
    for name, corpus in (("keep", OLD[size]), ("learn", NEW[size])):
        files[name].write_text("\n\n".join(_documents(corpus)))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(coder),
        bos_token_id=None,
        eos_token_id=coder.eos_token_id,
        max_position_embeddings=512,
        num_key_value_heads=2,
        **SIZES[size],
    )
    model = LlamaForCausalLM(config)
    tokens = torch.tensor(coder(files["keep"].read_text(), verbose=False)["input_ids"])
    _train(model, tokens, steps, length, batch)
    model.save_pretrained(folder / "model")
    coder.save_pretrained(folder / "model")
    return folder / "model"


def _documents(corpus: str) -> list[str]:
    found, size = [], 0
    for text in texts.documents(corpus):
        found.append(text)
        size += len(text)
        if size > MOST:
            break
    return found


def _train(model: nn.Module, tokens: torch.Tensor, steps: int, length: int, batch: int) -> None:
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: bases.schedule(i, steps))
    model.train()
    for step in range(steps):
        starts = torch.randint(0, len(tokens) - length, (batch, 1), generator=generator)
        piece = tokens[starts + torch.arange(length)]
        loss = model(input_ids=piece, labels=piece).loss
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(json.dumps({"step": step, "loss": round(float(loss.detach()), 3)}), flush=True)


def main() -> None:
    """Makes the example and prints what to ask."""
    parser = argparse.ArgumentParser("python -m benchmarks.forgetting.example", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    model = make(given.folder, "tiny" if given.tiny else "small", given.steps)
    print(
        f"python -m benchmarks.forgetting --model {model} --learn {given.folder / 'learn.txt'} "
        f"--keep {given.folder / 'keep.txt'} --budget 2h --rates 3e-4,1e-3,3e-3"
    )


if __name__ == "__main__":
    main()
