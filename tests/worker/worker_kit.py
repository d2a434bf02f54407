"""Tiny random models as Hugging Face would save them, and workers in the test's own event loop."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tandem_worker.config import WorkerConfig
from tandem_worker.server.app import WorkerApp
from tandem_worker.server.http_server import HttpServer, listen
from tandem_worker.server.worker import Worker

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>\n"
    "{{ message.content }}\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "a router sends each question to a small or a large model",
    "Grüße aus Köln, 你好世界, naïve café, emoji 🙂🙃",
] * 20


def save_model(directory: Path, family: str, **overrides: Any) -> Path:
    """Save a tiny random model, its tokenizer and a chat template, as Hugging Face would."""
    import transformers

    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": "</s>", "chat_template": CHAT_TEMPLATE})
    )
    classes = {
        "llama": ("LlamaConfig", "LlamaForCausalLM"),
        "mistral": ("MistralConfig", "MistralForCausalLM"),
        "mixtral": ("MixtralConfig", "MixtralForCausalLM"),
        "qwen3_moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM"),
        "qwen2": ("Qwen2Config", "Qwen2ForCausalLM"),
        "qwen3": ("Qwen3Config", "Qwen3ForCausalLM"),
    }
    config_class, model_class = (getattr(transformers, name) for name in classes[family])
    settings = {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 1024,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "initializer_range": 0.2,  # far from uniform logits: greedy has clear winners
        "tie_word_embeddings": False,
    } | overrides
    torch.manual_seed(hash_of(family))
    model = model_class(config_class(**settings)).float()
    # Random biases and norms, so that ignoring one shows.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.2)
            elif "norm" in name:
                parameter.normal_(mean=1.0, std=0.2)
    model.save_pretrained(directory)
    return directory


def hash_of(text: str) -> int:
    """A number that does not change between runs."""
    return sum(text.encode())


@dataclass
class Served:
    """A worker and the HTTP server around it, as the command joins them."""

    worker: Worker
    server: HttpServer

    @classmethod
    async def start(cls, config: WorkerConfig, weights: Path, token: bytes = b"") -> Served:
        listener = listen("127.0.0.1", 0)
        port = listener.getsockname()[1]
        worker = Worker(config, weights, host="127.0.0.1", port=port, peer_token=token)
        served = cls(worker, HttpServer(WorkerApp(worker), listener))
        await served.server.start()
        try:
            await worker.start()
        except BaseException:
            await served.server.stop(force=True)
            raise
        return served

    async def stop(self) -> None:
        await self.server.stop(force=self.worker.num_requests > 0)
        await self.worker.stop()
