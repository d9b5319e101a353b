"""Finds parameters that a traced graph (torch.fx, torch.export, TorchScript) changes before it multiplies with them."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable
from functools import reduce
from typing import Any

import torch
import torch.fx

# Operations that multiply with a parameter, or look it up.
_USES = frozenset(
    (
        *("linear", "matmul", "mm", "bmm", "mv", "addmm", "addmv", "baddbmm", "einsum", "bilinear", "tensordot"),
        *("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "convolution"),
        *("_convolution", "embedding", "embedding_bag", "multi_head_attention_forward", "lstm", "gru", "rnn_tanh"),
        *("rnn_relu", "dot", "chain_matmul", "inner", "vdot", "_addmm_activation"),
        *("_transformer_encoder_layer_fwd", "_native_multi_head_attention"),
    )
)
# Operations that return or check sizes, dtypes and the like.
_QUESTIONS = frozenset(
    (
        *("size", "sym_size", "dim", "ndimension", "numel", "sym_numel", "len", "is_floating_point", "device", "dtype"),
        *("_assert_tensor_metadata", "_assert_async", "_assert_scalar", "stride", "sym_stride", "storage_offset"),
        *("requires_grad", "is_cuda", "is_cpu", "is_nested", "layout", "prim_device", "prim_dtype", "is_contiguous"),
        "element_size",
    )
)
# Operations whose result has the same entries; their users are followed.
_VIEWS = frozenset(
    (
        *("t", "T", "mT", "numpy_T", "transpose", "swapaxes", "permute", "view", "reshape", "flatten", "contiguous"),
        *("squeeze", "unsqueeze", "expand", "detach", "alias", "to", "_to_copy", "type_as", "type", "float", "half"),
        *("bfloat16", "double", "clone", "chunk", "split", "split_with_sizes", "unbind", "getitem", "slice", "select"),
        *("getattr", "__getitem__", "ListUnpack", "TupleUnpack", "lift_fresh_copy", "narrow"),
    )
)


def altered_in_graphs(model: torch.nn.Module) -> dict[int, str]:
    """Return the operations that graphs apply to matrices before multiplying, by the id of the module that holds each.

    Empty for models without graphs. Such an operation is a reason to doubt that the layer multiplies with the
    parameter, but not a proof.
    """
    found: dict[int, str] = {}
    seen: set[str] = set()  # a graph contains the graphs of its child modules
    for name, module in model.named_modules():
        if isinstance(module, (torch.fx.GraphModule, torch.jit.ScriptModule)) and not _is_below(name, seen):
            seen.add(name)
            # Graphs of other versions, and freed ones, are ignored.
            with contextlib.suppress(RuntimeError, AttributeError):
                of_kind = _of_fx if isinstance(module, torch.fx.GraphModule) else _of_script
                found |= {id(holder): how for holder, how in of_kind(module)}
    return found


def _is_below(name: str, above: Collection[str]) -> bool:
    words = name.split(".") if name else []
    return any(".".join(words[:n]) in above for n in range(len(words)))


def _of_fx(module: Any) -> list[tuple[torch.nn.Module, str]]:
    matrices = {name for name, p in module.named_parameters(remove_duplicate=False) if p.dim() >= 2}
    found = []
    for node in module.graph.nodes:
        known = node.op == "get_attr" and str(node.target) in matrices
        if known and (how := _altered_by(node.users)) is not None:
            found.append((module.get_submodule(str(node.target).rpartition(".")[0]), how))
    return found


def _altered_by(users: Iterable[torch.fx.Node]) -> str | None:
    for user in users:
        if user.op == "output":
            continue
        name = _name_of(user)
        if name in _QUESTIONS or (name == "getattr" and user.args[1] not in _VIEWS):
            continue
        if name in _VIEWS:
            if (how := _altered_by(user.users)) is not None:
                return how
        elif name not in _USES:
            return name
    return None


def _name_of(node: torch.fx.Node) -> str:
    target: Any = node.target
    if node.op in ("call_method", "call_module"):  # such as a module that rounds the weight
        return str(target)
    schema = getattr(target, "_schema", None)
    if schema is not None:
        return str(schema.name).rpartition("::")[2]
    return str(getattr(target, "__name__", target))


def _of_script(module: Any) -> list[tuple[torch.nn.Module, str]]:
    matrices = {name for name, parameter in module.named_parameters() if parameter.dim() >= 2}
    found = []
    graph = module.inlined_graph  # this reference keeps the nodes alive
    for node in graph.findAllNodes("prim::GetAttr"):
        path = _path_to(node)
        if ".".join(path) in matrices and (how := _altered_in_script(node.output())) is not None:
            found.append((reduce(getattr, path[:-1], module), how))
    return found


def _path_to(node: Any) -> list[str]:
    """Return the names of the attributes that lead from the module of the graph to the value of this node."""
    path: list[str] = []
    while node.kind() == "prim::GetAttr":
        path.insert(0, node.s("name"))
        node = node.input().node()
    return path


def _altered_in_script(value: Any) -> str | None:
    for use in value.uses():
        name = use.user.kind().rpartition("::")[2]
        if name in _QUESTIONS:
            continue
        if name in _VIEWS:
            for output in use.user.outputs():
                if (how := _altered_in_script(output)) is not None:
                    return how
        elif name not in _USES and use.user.kind() not in ("prim::Return", "prim::CallFunction", "prim::CallMethod"):
            return str(name)
    return None
