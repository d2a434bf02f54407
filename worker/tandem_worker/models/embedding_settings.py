"""How a checkpoint wants its texts made into vectors, as sentence-transformers saves it.

`modules.json` lists what follows the model: a pooling, whose kind `1_Pooling/config.json` says, and
perhaps a normalisation. Without it the last token's state, at length 1, is the vector.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tandem_worker.errors import ModelError
from tandem_worker.models.files import MODULES, POOLING, locate, read_json, read_text

PoolingKind = Literal["last", "mean", "cls"]
_KINDS: dict[str, PoolingKind] = {
    "pooling_mode_lasttoken": "last",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "lasttoken": "last",
    "mean": "mean",
    "cls": "cls",
}
"""As flags, and as `pooling_mode` has them."""
_NEXT = "name pooling (last, mean or cls) in the request"


@dataclass(frozen=True)
class EmbeddingSettings:
    """Attributes:
    pooling: What a request that names none gets.
    normalize: Whether vectors have length 1.
    problem: Why the checkpoint's own vectors cannot be had, or empty.
    """

    pooling: PoolingKind = "last"
    normalize: bool = True
    problem: str = ""


def read_embedding_settings(directory: Path) -> EmbeddingSettings:
    """The settings of a model directory; what is broken or not served is their problem."""
    try:
        return _read(directory)
    except ModelError as error:
        return EmbeddingSettings(problem=f"{error}; {_NEXT}")


def _read(directory: Path) -> EmbeddingSettings:
    path = locate(directory, MODULES)
    if path is None:
        return EmbeddingSettings()
    try:
        modules = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{MODULES} is not JSON that can be used") from error
    if not isinstance(modules, list) or not all(isinstance(m, dict) for m in modules):
        raise ModelError(f"{MODULES} must be a list of objects")
    kinds = [str(module.get("type", "")).rpartition(".")[2] for module in modules]
    for kind in kinds:
        if kind not in ("Transformer", "Pooling", "Normalize"):
            raise ModelError(f"{MODULES} has a module {kind[:80]!r}, which is not computed here")
    if kinds.count("Pooling") != 1:
        raise ModelError(f"{MODULES} has {kinds.count('Pooling')} modules 'Pooling'; one is read")
    folder = modules[kinds.index("Pooling")].get("path")
    found = locate(directory, POOLING)
    if found is None or folder != POOLING.partition("/")[0]:
        raise ModelError(
            f"{MODULES} names the pooling {str(folder)[:80]!r}; only {POOLING} is read, and has to "
            "be there"
        )
    return EmbeddingSettings(_kind(read_json(found)), normalize="Normalize" in kinds)


def _kind(config: Mapping[str, Any]) -> PoolingKind:
    named = config.get("pooling_mode")
    asked = [named] if named else []
    asked += [key for key, on in config.items() if key.startswith("pooling_mode_") and on]
    kinds = {_KINDS[name] for name in map(str, asked) if name in _KINDS}
    if len(kinds) != 1 or not all(str(name) in _KINDS for name in asked):
        said = " and ".join(str(name)[:80] for name in asked[:4]) or "nothing"
        raise ModelError(f"{POOLING} asks for {said}, which is not served")
    return kinds.pop()
