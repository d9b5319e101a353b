"""Selections of all entries, and names on disk: for the tests of matching and quantized models."""

from __future__ import annotations

from safetensors.torch import save_file

from kappa_fast import Selection


def everything(ranking):
    return Selection(tuple(ranking), True, {})


def on_disk(model, family, folder):
    """The tensors as the hub has them: one 2-D tensor for every expert and projection."""
    gate, up, down = ("w1", "w3", "w2") if family == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    tensors = {}
    for name, tensor in model.state_dict().items():
        if ".experts.gate_up_proj" in name or ".experts.down_proj" in name:
            home = name.rpartition(".")[0]
            home = home.replace(".mlp.", ".block_sparse_moe.") if family == "mixtral" else home
            for e, matrix in enumerate(tensor):
                parts = zip((gate, up), matrix.chunk(2), strict=True) if "gate_up" in name else [(down, matrix)]
                tensors |= {f"{home}.{e}.{part}.weight": piece.contiguous() for part, piece in parts}
        else:
            name = name.replace(".mlp.gate.", ".block_sparse_moe.gate.") if family == "mixtral" else name
            tensors[name] = tensor.contiguous()
    save_file(tensors, folder / "model.safetensors")
    return tensors
