"""The model that a config.json describes, built on the meta device, without running anything that the config names.

An untrusted config can make transformers load code of the repository (``auto_map``), kernels from the hub, quantizers
and pretrained backbones. Such settings are removed at every depth, and the classes must be defined by transformers.
While the model is built, its thread cannot open connections, start processes or read input. Numbers of layers, experts
and the like that exceed the limits are refused before the model is built.
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

# Keys that are removed at every depth: they name code, where to get it, or one of several implementations. Keys that
# describe a part of the model (num_quantizers, audio_tokenizer_config) stay.
_NAMES_CODE = re.compile(
    r"auto_map|trust_remote_code|custom_(?:generate|pipelines?|code)|quantization(?:_config)?|compression_config"
    r"|\w*(?:attn|attention|experts)_implementation\w*|use_kernels?|\w*kernels?_(?:config|repo|mapping)|_?name_or_path"
    r"|_commit_hash|use_pretrained_\w+|(?:torch_)?dtype|device_map|\w*[tp]p_plan"
)
# Keys that are removed where their value is a string: it names another file or repository.
_NAMES_FILES = re.compile(r"tokenizer|processor|pretrained|repo|revision|hub|url")

# Keys whose value is a number of modules or labels, and words in keys whose value is another number.
_COUNTS = re.compile(
    r"^n_|(?:^|_)(?:num|number|count)(?:_|$)|layer|block|depth|stage|expert|label|head|branch|codebook|level"
)
_MEASURES = re.compile(
    r"position|ctx|embd?|dim|vocab|words|token|size|length|frame|sample|param|step|bin|factor|channel|pixel|width|floor"
    r"|record|entit|_ids?$"
)
_LABELS = re.compile(r"label|class")  # a label takes only an entry of a table
_LAYERS = re.compile(r"layers?$")
_TABLES = re.compile(r"vocab|token|2id|id2|_map(?:ping)?$")  # tables whose keys may be any words

_FORBIDDEN = (
    *("socket.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.startfile"),
    *("pty.", "builtins.input", "urllib.", "http.client.", "ftplib.", "smtplib.", "webbrowser."),
)
_thread = threading.local()
_building = threading.RLock()  # one model is built at a time: the filters of warnings belong to the whole process
_hooked = False


def architecture(config: Mapping[str, Any], where: str = "config.json") -> torch.nn.Module | None:
    """Build the model that the config describes on the meta device.

    Returns None if transformers is not installed or cannot build the model, or if the config names code of its own.
    where: the file, for messages.

    Raises:
        SourceError: a number of layers, experts or the like exceeds its limit.
    """
    kind, architectures = config.get("model_type"), config.get("architectures")
    if not isinstance(kind, str) or not isinstance(architectures, list) or not architectures:
        return None
    if "auto_map" in config:  # the model needs code of the checkpoint, which is never run
        return None
    _check_counts(config, where, _LAYERS)  # before the import, which takes seconds
    try:
        import transformers
    except ImportError:
        log.info("transformers is not installed: the names of the checkpoint are kept")
        return None
    try:
        with _silent():
            chosen = _class_of(transformers, architectures[0])
            _check_counts(config, where)
            plain = {key: value for key, value in _sanitized(config).items() if key != "model_type"}
            with _sealed(), _counting(where), torch.device("meta"):
                built = transformers.AutoConfig.for_model(kind, **plain)
                _check_own(built)
                built._attn_implementation = "eager"  # the default of some models is a kernel from the hub
                model: torch.nn.Module = chosen(built)
    except KappaError:
        raise
    except Exception as error:  # a wrong config may raise anything
        log.info("transformers cannot build %r from config.json (%s): the names of the file are kept", kind, error)
        return None
    return model


def _class_of(transformers: Any, name: object) -> Any:
    """Return the model class of transformers that has this name; raise TypeError if there is none."""
    found = getattr(transformers, str(name))
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel) and _is_own(found)):
        raise TypeError(f"{name!r} is not a model of transformers")
    return found


def _is_own(found: type) -> bool:
    """Return whether a class is defined by transformers; other packages may have registered classes there."""
    return found.__module__.partition(".")[0] == "transformers" and ".models." in f"{found.__module__}."


def _check_own(config: Any) -> None:
    """Raise TypeError if a configuration, or one nested in it, is not defined by transformers."""
    if not _is_own(type(config)):
        raise TypeError(f"{type(config).__name__} is not a configuration of transformers")
    for name in getattr(type(config), "sub_configs", None) or ():
        if (inner := getattr(config, name, None)) is not None:
            _check_own(inner)


def _sanitized(value: Any) -> Any:
    """Return a copy of plain JSON without the keys that make transformers download or choose code.

    transformers writes numbers that JSON lacks, such as infinity, as objects; the copy has the numbers.
    """
    if isinstance(value, Mapping):
        if value.keys() == {"__float__"}:
            return float(value["__float__"])
        return {key: _sanitized(item) for key, item in value.items() if not _is_removed(str(key).lower(), item)}
    if isinstance(value, list):
        return [_sanitized(item) for item in value]
    return value


def _is_removed(key: str, value: Any) -> bool:
    return _NAMES_CODE.fullmatch(key) is not None or (isinstance(value, str) and _NAMES_FILES.search(key) is not None)


def _check_counts(config: Mapping[str, Any], where: str, counts: re.Pattern[str] = _COUNTS) -> None:
    """Raise SourceError if a number at any depth asks for too many modules or labels."""
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
    """Silence warnings and the log of transformers: the model that is built will not run."""
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
    """Raise SourceError when this thread has registered more than MOST_MODULES modules."""
    from torch.nn.modules.module import register_module_module_registration_hook

    thread, count = threading.get_ident(), 0

    def note(*_: object) -> None:
        nonlocal count
        if threading.get_ident() == thread:
            count += 1
            check_limit(where, "the number of modules in the model that it describes", count, MOST_MODULES)

    handle = register_module_module_registration_hook(note)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _sealed() -> Iterator[None]:
    """Forbid this thread to open connections, start processes and read input."""
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
        raise PermissionError(f"{event} is forbidden while a model is built from an untrusted config")
