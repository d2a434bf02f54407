"""An optional view: the mean of a local model's token vectors, read without running the model.

A directory in Hugging Face's layout (an encoder, a Llama-like model, or a model2vec table) holds a
tokenizer and one matrix with a row per token. The weighted mean of a prompt's rows, of length one,
knows from the model's pretraining which words are alike. Nothing is downloaded, torch is not
needed, and the matrix stays on disk: only the rows of a prompt are read. The artifact stores the
directory's name and digest, never its weights.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tandem_router.predictor.errors import PredictorError

FloatArray = npt.NDArray[np.float64]

MAX_HEADER_BYTES = 100_000_000
MAX_TOKENS = 2048
MAX_WIDTH = 8192
#: Names of the matrix, by the end of the tensor's name; the first that fits is taken.
TABLES = (
    "word_embeddings.weight",
    "embed_tokens.weight",
    "wte.weight",
    "embedding.weight",
    "embeddings",
)
_DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}


class EmbeddingError(PredictorError):
    """The directory does not hold what the embedding view needs; the message says what to do."""


class StaticEmbedding:
    """Token vectors of a local directory, pooled.

    `width` is the length of a pooled vector, `digest` tells one tokenizer and matrix from another.
    """

    def __init__(self, directory: Path) -> None:
        self.name = directory.resolve().name
        tokenizer = directory / "tokenizer.json"
        if not tokenizer.is_file():
            raise EmbeddingError(
                f"{directory} has no tokenizer.json; name a model directory as Hugging Face lays "
                "it out, with tokenizer.json and *.safetensors"
            )
        self._tokenizer = _tokenizer(tokenizer)
        path, name, entry, start = _find_table(directory)
        self._rows = _mapped(path, name, entry, start)
        self.width = int(self._rows.shape[1])
        # tables made for averaging (model2vec, wordllama) have weighed their rows already
        self._weighs = not name.startswith("embedding")
        digest = hashlib.sha256(tokenizer.read_bytes())
        digest.update(name.encode())
        digest.update(self._rows[:: max(len(self._rows) // 4096, 1)].tobytes())
        digest.update(str(self._rows.shape).encode())
        self.digest = digest.hexdigest()

    def __call__(self, text: str) -> FloatArray:
        """``(width,)``, length one, or zeros for a text without tokens."""
        found = self._tokenizer.encode(
            text.encode("utf-8", "replace").decode(), add_special_tokens=False
        )
        tokens = np.array(found.ids[:MAX_TOKENS], dtype=np.int64)
        tokens = tokens[tokens < len(self._rows)]
        if len(tokens) == 0:
            return np.zeros(self.width)
        tokens, counts = np.unique(tokens, return_counts=True)
        rows = self._rows[tokens]
        if rows.dtype == np.uint16:  # bfloat16 is the upper half of float32
            rows = (rows.astype(np.uint32) << np.uint32(16)).view(np.float32)
        # Token ids are in order of frequency: Zipf's law makes the logarithm a rarity.
        weights = counts * np.log(2.0 + tokens) if self._weighs else counts.astype(np.float64)
        pooled: FloatArray = weights @ np.nan_to_num(rows.astype(np.float64))
        norm = float(np.sqrt(pooled @ pooled))
        return pooled / norm if norm > 0.0 else pooled


def _tokenizer(path: Path) -> Any:
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise EmbeddingError(
            "the embedding view needs the package `tokenizers`; install it beside the router"
        ) from error
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises nothing narrower
        raise EmbeddingError(f"{path} cannot be read: {error}; copy it again") from error


def _find_table(directory: Path) -> tuple[Path, str, dict[str, Any], int]:
    """File, name, header entry and start of the data of the token matrix."""
    files = sorted(directory.glob("*.safetensors"))
    for path in files:
        header, start = _header(path)
        for ending in TABLES:
            for name in sorted(header):
                if name.endswith(ending) and "position" not in name:
                    return path, name, header[name], start
    raise EmbeddingError(
        f"{directory} has {len(files)} *.safetensors and none holds a token matrix "
        f"(*{', *'.join(TABLES)}); use a model with one of them"
    )


def _header(path: Path) -> tuple[dict[str, Any], int]:
    try:
        with path.open("rb") as stream:
            raw = stream.read(8)
            size = struct.unpack("<Q", raw)[0] if len(raw) == 8 else MAX_HEADER_BYTES + 1
            if size > MAX_HEADER_BYTES:
                raise EmbeddingError(f"{path} is no safetensors file; copy it again")
            header = json.loads(stream.read(size))
    except (OSError, ValueError, RecursionError) as error:
        raise EmbeddingError(f"{path} cannot be read ({error}); copy it again") from error
    if not isinstance(header, dict):
        raise EmbeddingError(f"{path} is no safetensors file; copy it again")
    return {name: entry for name, entry in header.items() if isinstance(entry, dict)}, 8 + size


def _mapped(path: Path, name: str, entry: dict[str, Any], start: int) -> npt.NDArray[Any]:
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    dtype = _DTYPES.get(str(entry.get("dtype")))
    if dtype is None:
        raise EmbeddingError(
            f"{path}: {name} is {entry.get('dtype')}, not F32, F16 or BF16; use such weights"
        )
    fits = (
        isinstance(shape, list)
        and isinstance(offsets, list)
        and len(shape) == 2
        and len(offsets) == 2
        and all(isinstance(n, int) and n >= 0 for n in (*shape, *offsets))
        and 1 <= shape[1] <= MAX_WIDTH
        and shape[0] >= 1
        and offsets[1] - offsets[0] == math.prod(shape) * dtype.itemsize
        and start + offsets[1] <= path.stat().st_size
    )
    if not fits or not isinstance(shape, list) or not isinstance(offsets, list):
        raise EmbeddingError(f"{path}: {name} does not fit the file; copy it again")
    rows: npt.NDArray[Any] = np.memmap(
        path, dtype=dtype, mode="r", offset=start + offsets[0], shape=(shape[0], shape[1])
    )
    return rows
