"""Write a trained model as a Hugging Face Llama directory, and build the pair's tokenizer.

Both models share one byte-level BPE in which digits, lone capitals and brackets never merge, so
that a number, a string of letters or a row of brackets is always one token per character.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

END, PAD = "<|end|>", "<|pad|>"
_ALONE = r"[0-9]|[A-Z](?![a-z])|[()\[\]{}>]"
MAX_POSITIONS = 512
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{{ message['content'] | trim + '\\n' }}"
    "{%- elif message['role'] == 'assistant' -%}{{ message['content'] + eos_token }}"
    "{%- endif -%}{%- endfor -%}"
)
"""One user turn becomes exactly the form of training: the question and a newline."""


def build_tokenizer(texts: Iterable[str], vocab: int) -> Tokenizer:
    """Train the byte-level BPE on ``texts``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_ALONE), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def export(
    folder: Path, shape: Mapping[str, Any], weights: Mapping[str, Tensor], tokenizer: Path
) -> None:
    """Write ``folder`` so that readers see the old directory or the new one, never a half."""
    end, pad = 0, 1
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape["hidden"],
        "num_hidden_layers": shape["layers"],
        "num_attention_heads": shape["heads"],
        "num_key_value_heads": shape["kv_heads"],
        "head_dim": shape["head_dim"],
        "intermediate_size": shape["intermediate"],
        "vocab_size": shape["vocab"],
        "rope_theta": shape["rope_theta"],
        "rms_norm_eps": shape["eps"],
        "max_position_embeddings": MAX_POSITIONS,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
        "bos_token_id": None,
        "eos_token_id": end,
        "pad_token_id": pad,
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }
    generation = {
        "do_sample": False,
        "eos_token_id": end,
        "pad_token_id": pad,
        "max_new_tokens": 96,
    }
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": PAD,
        "model_max_length": MAX_POSITIONS,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".export-") as made:
        fresh = Path(made) / folder.name
        fresh.mkdir()
        for name, content in (
            ("config.json", config),
            ("generation_config.json", generation),
            ("tokenizer_config.json", tokenizer_config),
            ("special_tokens_map.json", {"eos_token": END, "pad_token": PAD}),
        ):
            (fresh / name).write_text(json.dumps(content, indent=2) + "\n")
        (fresh / "chat_template.jinja").write_text(CHAT_TEMPLATE + "\n")
        shutil.copyfile(tokenizer, fresh / "tokenizer.json")
        save_file(llama_names(shape, weights), fresh / "model.safetensors", {"format": "pt"})
        (fresh / "model.safetensors").chmod(0o644)
        if folder.exists():
            os.rename(folder, Path(made) / "old")
        os.rename(fresh, folder)


def llama_names(shape: Mapping[str, Any], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our fused matrices under the names that transformers gives the parts."""
    heads, kv, d = shape["heads"], shape["kv_heads"], shape["head_dim"]
    named = {
        "model.embed_tokens.weight": weights["embed.weight"],
        "model.norm.weight": weights["norm.weight"],
    }
    for i in range(shape["layers"]):
        ours, theirs = f"blocks.{i}.", f"model.layers.{i}."
        q, k, v = weights[ours + "qkv.weight"].split((heads * d, kv * d, kv * d))
        gate, up = weights[ours + "gate_up.weight"].chunk(2)
        named |= {
            theirs + "self_attn.q_proj.weight": q,
            theirs + "self_attn.k_proj.weight": k,
            theirs + "self_attn.v_proj.weight": v,
            theirs + "self_attn.o_proj.weight": weights[ours + "out.weight"],
            theirs + "mlp.gate_proj.weight": gate,
            theirs + "mlp.up_proj.weight": up,
            theirs + "mlp.down_proj.weight": weights[ours + "down.weight"],
            theirs + "input_layernorm.weight": weights[ours + "norm1.weight"],
            theirs + "post_attention_layernorm.weight": weights[ours + "norm2.weight"],
        }
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in named.items()}
