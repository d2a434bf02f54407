"""What a checkpoint brings that changes answers and that nobody asked for by name: logged, told."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tandem_worker.config import WorkerConfig
    from tandem_worker.engine.runner import ModelRunner
    from tandem_worker.tokenization.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


def context_notes(config: WorkerConfig, runner: ModelRunner) -> list[str]:
    """Where answers end or go wrong otherwise than the settings promise; in status of the Model."""
    spec, asked, served = runner.spec, config.max_model_len, runner.max_model_len
    notes = []
    if served > spec.max_position:
        notes.append(
            f"max_model_len={served} is beyond the {spec.max_position} tokens that the model was "
            f"made for, and answers at such positions are not to be trusted; set maxModelLen to "
            f"{spec.max_position} or less"
        )
    if asked is not None and served < asked:
        notes.append(
            f"max_model_len={asked} does not fit: the KV cache holds {served} tokens, and longer "
            "requests are refused; raise kvCacheMemory, or lower maxModelLen"
        )
    return notes


def say_what_surprises(config: WorkerConfig, runner: ModelRunner, tokenizer: Tokenizer) -> None:
    """Log it, once, as the worker starts."""
    spec = runner.spec
    if tokenizer.vocab_size > spec.vocab_size:
        logger.warning(
            "the tokenizer knows %d tokens, the model %d; requests whose text needs a token from "
            "%d on are refused",
            tokenizer.vocab_size,
            spec.vocab_size,
            spec.vocab_size,
        )
    if spec.rope_scaling.get("rope_type") in ("yarn", "linear"):
        logger.warning(
            "%s scaling by %s stretches a context of %d tokens to %d, for short prompts too; set "
            "max_model_len and remove the scaling from config.json where they matter more",
            spec.rope_scaling["rope_type"],
            spec.rope_scaling["factor"],
            spec.trained_position,
            spec.max_position,
        )
    for note in context_notes(config, runner):
        logger.warning("%s", note)
    if spec.quantization is not None:
        logger.info(
            "%s weights take %.1f MB in memory, %.1f MB as %s%s",
            spec.quantization.method,
            runner.model.weights.num_bytes() / 1e6,
            spec.num_parameters * runner.dtype.itemsize / 1e6,
            runner.dtype,
            "; activations are not rounded, though the format says so"
            if spec.quantization.quantizes_activations
            else "",
        )
    if spec.sampling_defaults:
        logger.info("sampling defaults of generation_config.json: %s", dict(spec.sampling_defaults))
