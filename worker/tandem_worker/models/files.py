"""Which files of a model directory a worker reads, and how it reads them without being hurt.

Downloads fetch exactly these files, the weights' identity is a digest of them, and every reader
opens them through :func:`locate`, so that a link or a device in a folder that someone else wrote
shows nothing else of this machine. No torch here.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tandem_worker.errors import ModelError

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
TOKENIZER = "tokenizer.json"
EXACT_ANSWERS = "exact_answers.json"
MODULES = "modules.json"
POOLING = "1_Pooling/config.json"
"""The one file that is read from a folder inside the directory."""
TEXT_FILES = (
    CONFIG,
    "generation_config.json",
    "quantize_config.json",
    TOKENIZER,
    "tokenizer_config.json",
    "chat_template.jinja",
    EXACT_ANSWERS,
    MODULES,
    POOLING,
)
"""Read where present; besides them only weights."""

MAX_CONFIG_BYTES = 4 * 2**20
MAX_INDEX_BYTES = 64 * 2**20
MAX_TOKENIZER_BYTES = 256 * 2**20
MAX_SHARDS = 2000

_OTHER_FORMATS = (
    (".gguf", "GGUF", "name the repository that the GGUF was made from"),
    (".bin", "PyTorch pickles (.bin)", "convert them with transformers' save_pretrained"),
    (".pth", "PyTorch pickles (.pth)", "convert them with transformers' save_pretrained"),
    (".pt", "PyTorch pickles (.pt)", "convert them with transformers' save_pretrained"),
    (".onnx", "ONNX", "name the repository that the ONNX file was made from"),
    (".h5", "TensorFlow weights (.h5)", "convert them with transformers' save_pretrained"),
    (".msgpack", "Flax weights (.msgpack)", "convert them with transformers' save_pretrained"),
)


def check_formats(names: Iterable[str], where: str) -> None:
    """Refuse, by the names of its files alone, a directory that no worker can load.

    Raises:
        ModelError: one sentence that names the format found and the next step.
    """
    plain = {name for name in names if "/" not in name}
    if "adapter_config.json" in plain and not plain & {INDEX, SINGLE}:
        raise ModelError(
            f"{where} holds an adapter alone (adapter_config.json), no model; merge it into its "
            "base model (peft: merge_and_unload, save_pretrained) and name the result"
        )
    if not plain & {INDEX, SINGLE}:
        for suffix, format, advice in _OTHER_FORMATS:
            found = sorted(name for name in plain if name.endswith(suffix))
            if found:
                raise ModelError(
                    f"{where} holds {format}, {found[0]} for one, and no safetensors under "
                    f"Hugging Face's names, which is what a worker reads; {advice}"
                )
        other = sorted(name for name in plain if name.endswith(".safetensors"))
        if other:
            raise ModelError(
                f"{where} holds {other[0]}, but neither {SINGLE} nor {INDEX}; save the model in "
                "Hugging Face's layout (transformers' save_pretrained)"
            )
        raise ModelError(
            f"{where} holds no .safetensors file: neither {SINGLE} nor {INDEX}; name a folder "
            "in Hugging Face's layout"
        )
    if CONFIG not in plain:
        own = "; its params.json is Meta's or Mistral's own form" if "params.json" in plain else ""
        raise ModelError(f"{where} holds no {CONFIG}{own}; save it with transformers")
    if TOKENIZER not in plain:
        old = next((n for n in ("tokenizer.model", "vocab.json") if n in plain), None)
        found_old = f" ({old} is the slow form, which this worker does not read)" if old else ""
        raise ModelError(
            f"{where} holds no {TOKENIZER}{found_old}; save the tokenizer in its fast form "
            "(transformers: AutoTokenizer.from_pretrained(...).save_pretrained)"
        )


def names_in(directory: Path) -> set[str]:
    """Names of the files of a model directory.

    Raises:
        ModelError: it cannot be listed.
    """
    try:
        return {entry.name for entry in directory.iterdir()}
    except OSError as error:
        raise ModelError(f"{directory} cannot be listed: {error.strerror}") from error


def locate(directory: Path, name: str) -> Path | None:
    """The file of that name, or None where there is none.

    Raises:
        ModelError: the name leaves the directory, by itself or by a link, or is no regular file.
    """
    is_plain = Path(name).name == name and name not in ("", ".", "..") and "\0" not in name
    if not is_plain and name != POOLING:
        raise ModelError(f"{directory}: {name!r} must be a plain file name")
    path = directory / name
    try:
        real = path.resolve(strict=True)
        mode = real.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        if path.is_symlink():
            raise ModelError(f"{path} is a link to nothing; bring the whole folder") from None
        return None
    except (OSError, RuntimeError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    if not any(real.is_relative_to(root) for root in _roots(directory)):
        raise ModelError(
            f"{path} is a link that leaves the weights folder; put the file itself there"
        )
    if not stat.S_ISREG(mode):
        raise ModelError(f"{path} is no regular file; a model directory holds files")
    return path


def _roots(directory: Path) -> list[Path]:
    """The directory, and in Hugging Face's own cache the blobs beside it, where its links go."""
    real = directory.resolve()
    roots = [real]
    if real.parent.name == "snapshots" and real.parent.parent.name.startswith("models--"):
        roots.append(real.parent.parent / "blobs")
    return roots


def read_text(path: Path, max_bytes: int = MAX_CONFIG_BYTES) -> str:
    """A text file of bounded size.

    Raises:
        ModelError: unreadable, too large, or not UTF-8.
    """
    try:
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    if len(data) > max_bytes:
        raise ModelError(f"{path} is larger than {max_bytes >> 20} MiB, the most that is read")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ModelError(f"{path} cannot be read: {error}") from error


def read_json(path: Path, max_bytes: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """A JSON object from a file of a model directory.

    Raises:
        ModelError: absent, unreadable, too large, too deep, or not an object.
    """
    text = read_text(path, max_bytes)
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise ModelError(f"{path} is not JSON: line {error.lineno}: {error.msg}") from error
    except RecursionError as error:
        raise ModelError(f"{path} is nested too deeply to be a model's") from error
    except ValueError as error:  # an integer of more digits than Python converts
        raise ModelError(f"{path} is not JSON that can be used: {error}") from error
    if not isinstance(data, dict):
        raise ModelError(f"{path} holds {type(data).__name__}, expected an object")
    return data


def weight_files(directory: Path) -> list[str]:
    """Names of the safetensors files that hold the model, sorted, be they there or not.

    Raises:
        ModelError: the index is broken.
    """
    index = locate(directory, INDEX)
    if index is None:
        return [SINGLE]
    shards = read_json(index, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ModelError(f"{index}: weight_map is missing or empty")
    files = set()
    for shard in shards.values():
        if not isinstance(shard, str) or Path(shard).name != shard or shard in ("", ".", ".."):
            raise ModelError(f"{index}: shard {shard!r} must be a plain file name")
        if not shard.endswith(".safetensors"):
            raise ModelError(f"{index}: shard {shard!r} is no .safetensors file")
        files.add(shard)
    if len(files) > MAX_SHARDS:
        raise ModelError(f"{index} names {len(files)} files; at most {MAX_SHARDS} are read")
    return sorted(files)


def loaded_files(directory: Path) -> list[str]:
    """Names of all files that a worker reads, in a fixed order: the parts of its identity.

    Raises:
        ModelError: the index of the weights is broken.
    """
    text = [name for name in (*TEXT_FILES, INDEX) if locate(directory, name) is not None]
    return sorted({*text, *weight_files(directory)})
