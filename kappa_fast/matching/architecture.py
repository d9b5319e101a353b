"""The model that a config.json describes, built without values, and without anything that the config could have done.

A config comes from strangers, and transformers follows it far: code of the repository (``auto_map``), kernels of the
hub for attention and experts, quantizers, pretrained backbones. All that is taken out at every depth; the class must be
one of transformers' own; and while the model is built, this thread can reach no network, start no process and ask
nothing. A count that no real model has is refused before anything is built.
"""

from __future__ import annotations

import contextlib
import logging
import re
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ..errors import KappaError
from ..io.limits import MOST_COUNTED, MOST_LABELS, MOST_MODULES, check_limit

log = logging.getLogger("kappa_fast")

# At every depth: what names code, where to get it, or which of several implementations to take; and texts that name
# something else of the repository. What describes a part of the model (num_quantizers, audio_tokenizer_config) stays.
_CHOSEN = re.compile(
    r"auto_map|trust_remote_code|custom_(?:generate|pipelines?|code)|quantization(?:_config)?|compression_config"
    r"|\w*(?:attn|attention|experts)_implementation\w*|use_kernels?|\w*kernels?_(?:config|repo|mapping)|_?name_or_path"
    r"|_commit_hash|use_pretrained_\w+|(?:torch_)?dtype|device_map|\w*[tp]p_plan"
)
_NAMED = re.compile(r"tokenizer|processor|pretrained|repo|revision|hub|url")

# What counts things that are built, or listed, one by one; and words in names of settings that say something else.
_COUNTS = re.compile(
    r"^n_|(?:^|_)(?:num|number|count)(?:_|$)|layer|block|depth|stage|expert|label|head|branch|codebook|level"
)
_MEASURES = re.compile(
    r"position|ctx|embd?|dim|vocab|words|token|size|length|frame|sample|param|step|bin|factor|channel|pixel|width|floor"
    r"|record|entit|_ids?$"
)
_LABELS = re.compile(r"label|class")  # no more than an entry of a table each
_LAYERS = re.compile(r"layers?$")
_TABLES = re.compile(r"vocab|token|2id|id2|_map(?:ping)?$")  # whose keys are words of anybody

_FORBIDDEN = (
    *("socket.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.startfile"),
    *("pty.", "builtins.input", "urllib.", "http.client.", "ftplib.", "smtplib.", "webbrowser."),
)
_thread = threading.local()
_building = threading.RLock()  # warnings are silenced, and modules counted, for one model at a time
_hooked = False


def architecture(config: Mapping[str, Any], where: str = "config.json") -> torch.nn.Module | None:
    """The model that the config describes, without values; None if transformers cannot tell, or code beside it would.

    where: the file, for messages.

    Raises:
        SourceError: it counts layers, experts or the like beyond what any model has.
    """
    kind, architectures = config.get("model_type"), config.get("architectures")
    if not isinstance(kind, str) or not isinstance(architectures, list) or not architectures:
        return None
    if "auto_map" in config:  # code of the checkpoint's own, which nobody asked to run
        return None
    _check_counts(config, where, _LAYERS)  # before anything is imported, which takes seconds
    try:
        import transformers
    except ImportError:
        log.info("transformers is not installed: the names of the checkpoint are kept")
        return None
    try:
        with _silent():
            chosen = _class_of(transformers, architectures[0])
            _check_counts(config, where)
            plain = {key: value for key, value in _without_choices(config).items() if key != "model_type"}
            with _sealed(), _counting(where), torch.device("meta"):
                built = transformers.AutoConfig.for_model(kind, **plain)
                _check_own(built)
                built._attn_implementation = "eager"  # or a kernel might be fetched where one is usual
                model: torch.nn.Module = chosen(built)
    except KappaError:
        raise
    except Exception as error:  # a config may be wrong in as many ways as there are models
        log.info("transformers builds no %r from config.json (%s): its names are kept", kind, error)
        return None
    return model


def _class_of(transformers: Any, name: object) -> Any:
    """The model of transformers that has this name, else TypeError."""
    found = getattr(transformers, str(name))
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel) and _is_own(found)):
        raise TypeError(f"{name!r} is no model of transformers")
    return found


def _is_own(found: type) -> bool:
    """Whether a class is one of transformers' own: the user's environment may have registered others."""
    return found.__module__.partition(".")[0] == "transformers" and ".models." in f"{found.__module__}."


def _check_own(config: Any) -> None:
    """Raise TypeError where a configuration, or one inside of it, is none of transformers' own."""
    if not _is_own(type(config)):
        raise TypeError(f"{type(config).__name__} is no configuration of transformers")
    for name in getattr(type(config), "sub_configs", None) or ():
        if (inner := getattr(config, name, None)) is not None:
            _check_own(inner)


def _without_choices(value: Any) -> Any:
    """A copy of plain JSON without the keys that would have transformers fetch or choose something.

    transformers writes numbers that JSON does not have, such as infinity, as objects: they become numbers again.
    """
    if isinstance(value, Mapping):
        if value.keys() == {"__float__"}:
            return float(value["__float__"])
        return {key: _without_choices(item) for key, item in value.items() if not _is_choice(str(key).lower(), item)}
    if isinstance(value, list):
        return [_without_choices(item) for item in value]
    return value


def _is_choice(key: str, value: Any) -> bool:
    return _CHOSEN.fullmatch(key) is not None or (isinstance(value, str) and _NAMED.search(key) is not None)


def _check_counts(config: Mapping[str, Any], where: str, counts: re.Pattern[str] = _COUNTS) -> None:
    """Raise SourceError where a number at any depth would have too many things built one by one."""
    waiting: list[tuple[str, Any]] = [("", config)]
    while waiting:
        path, value = waiting.pop()
        if isinstance(value, Mapping):
            named = [(str(key), item) for key, item in value.items() if not _TABLES.search(str(key))]
            waiting += [(f"{path}.{key}" if path else key, item) for key, item in named]
        elif isinstance(value, list):
            waiting += [(path, item) for item in value if isinstance(item, (int, list, Mapping))]
        elif isinstance(value, int):
            key = path.rpartition(".")[2].lower()
            if counts.search(key) and not _MEASURES.search(key):
                check_limit(where, path, value, MOST_LABELS if _LABELS.search(key) else MOST_COUNTED)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Neither warnings about a model that nobody will run, nor lines of transformers' log."""
    logger = logging.getLogger("transformers")
    with _building, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        level = logger.level
        logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            logger.setLevel(level)


@contextlib.contextmanager
def _counting(where: str) -> Iterator[None]:
    """Raise SourceError when this thread has put more modules into others than any model has."""
    from torch.nn.modules.module import register_module_module_registration_hook

    thread, count = threading.get_ident(), 0

    def note(*_: object) -> None:
        nonlocal count
        if threading.get_ident() == thread:
            count += 1
            check_limit(where, "the number of modules of the model that it describes", count, MOST_MODULES)

    handle = register_module_module_registration_hook(note)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _sealed() -> Iterator[None]:
    """This thread can neither reach a network nor start a process nor ask a question."""
    global _hooked
    with _building:
        if not _hooked:
            sys.addaudithook(_refuse)
            _hooked = True
    _thread.sealed = True
    try:
        yield
    finally:
        _thread.sealed = False


def _refuse(event: str, _: object) -> None:
    if getattr(_thread, "sealed", False) and event.startswith(_FORBIDDEN):
        raise PermissionError(f"{event} is not for a model that is built for its names only")
