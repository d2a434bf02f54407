"""Checkpoints as they come: what starts, with which settings, and what is refused how."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tandem_worker.errors import ModelError, RequestError, WorkerError
from tandem_worker.models.checkpoint import load_weights
from tandem_worker.models.files import locate, read_json
from tandem_worker.models.spec import ModelSpec, rope_settings, sampling_defaults
from tandem_worker.openai.request import with_defaults
from tandem_worker.tokenization.chat_template import ChatTemplate
from tandem_worker.tokenization.tokenizer import Tokenizer

SHAPE = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def change(path: Path, **values: Any) -> None:
    data = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(data | values))


# -- what applies where a request says nothing -----------------------------------------------------


def test_end_tokens_are_those_of_all_files(model: Path) -> None:
    change(model / "config.json", eos_token_id=[1, 7])
    change(model / "generation_config.json", eos_token_id=9)

    assert ModelSpec.load(model).eos_token_ids == {1, 7, 9}


@pytest.mark.parametrize("value", [-1, None, [-1], []])
def test_no_end_token_is_written_in_several_ways(value: object) -> None:
    assert ModelSpec.from_config({**SHAPE, "eos_token_id": value}).eos_token_ids == set()


async def test_a_worker_ends_at_the_tokenizers_end_token_too(
    model: Path, start_worker: Any
) -> None:
    change(model / "config.json", eos_token_id=7)
    change(model / "generation_config.json", eos_token_id=9)

    worker = await start_worker(weights=model)

    assert worker.engine.core.eos_token_ids == {7, 9, 1}


def test_the_models_own_sampling_settings_fill_what_a_request_leaves_out() -> None:
    generation = {"do_sample": True, "temperature": 0.6, "top_k": 20, "max_new_tokens": 99}
    defaults = sampling_defaults(generation, "generation_config.json")

    filled = with_defaults({"prompt": "x", "temperature": None, "top_k": 5}, defaults)
    modern = with_defaults({"max_completion_tokens": 3}, defaults)

    assert filled == {"prompt": "x", "temperature": 0.6, "top_k": 5, "max_tokens": 99}
    assert "max_tokens" not in modern


async def test_a_worker_answers_with_the_models_own_sampling_settings(
    model: Path, start_worker: Any
) -> None:
    change(model / "generation_config.json", temperature=0.0, max_new_tokens=5)
    worker = await start_worker(weights=model)

    async with httpx.AsyncClient(base_url=worker.url) as client:
        body = {"prompt": "the quick", "seed": 1, "ignore_eos": True}
        plain = (await client.post("/v1/completions", json=body)).json()
        greedy = await client.post("/v1/completions", json={**body, "temperature": 0})

    assert plain["usage"]["completion_tokens"] == 5
    assert plain["choices"][0]["text"] == greedy.json()["choices"][0]["text"]


@pytest.mark.parametrize(
    "values", [{"temperature": "hot"}, {"top_k": [1]}, {"top_p": -1}, {"max_new_tokens": 0}]
)
def test_sampling_settings_that_are_none_are_named(model: Path, values: dict[str, Any]) -> None:
    change(model / "generation_config.json", **values)

    with pytest.raises(ModelError, match=next(iter(values))):
        ModelSpec.load(model)


async def test_a_tokenizer_larger_than_the_model_starts_and_refuses_what_the_model_lacks(
    tmp_path: Path, build_model: Callable[..., Path], start_worker: Any
) -> None:
    small = build_model(tmp_path / "small", "llama", vocab_size=300)
    tokenizer = Tokenizer(small)
    worker = await start_worker(weights=small)
    text = "the quick brown fox"
    assert max(tokenizer.encode(text)) >= 300

    async with httpx.AsyncClient(base_url=worker.url) as client:
        too_new = await client.post("/v1/completions", json={"prompt": text, "max_tokens": 2})
        known = await client.post("/v1/completions", json={"prompt": [5, 6], "max_tokens": 2})

    assert too_new.status_code == 400
    assert "the vocabulary ends at 299" in too_new.json()["error"]["message"]
    assert known.status_code == 200


# -- rotary settings -------------------------------------------------------------------------------

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_scaling": YARN, "rope_theta": 5e5},
        {"rope_scaling": {**YARN, "type": "yarn"}, "rope_theta": 5e5},
        {
            "rope_scaling": {"type": "yarn", "factor": 4.0, **{k: YARN[k] for k in list(YARN)[2:]}},
            "rope_theta": 5e5,
        },
        {"rope_parameters": {**YARN, "rope_theta": 5e5}},
        {"rope_parameters": {**YARN, "rope_theta": 5e5}, "rope_theta": 1e4},
        {"rope_parameters": {"full_attention": {**YARN, "rope_theta": 5e5}}},
        {
            "rope_parameters": {
                "full_attention": {**YARN, "rope_theta": 5e5},
                "sliding_attention": {**YARN, "rope_theta": 5e5},
            }
        },
    ],
)
def test_rotary_settings_are_read_in_every_spelling(spelling: dict[str, Any]) -> None:
    assert rope_settings(spelling, "config.json") == (YARN, 5e5)


@pytest.mark.parametrize(
    "given", [{}, {"rope_scaling": None}, {"rope_scaling": {"type": "default"}}]
)
def test_no_scaling_is_written_in_several_ways(given: dict[str, Any]) -> None:
    assert rope_settings({**given, "rope_theta": 5e5}, "config.json") == ({}, 5e5)


@pytest.mark.parametrize(
    ("scaling", "context"),
    [
        ({}, 1024),
        (YARN, 4096),
        ({"rope_type": "yarn", "factor": 4.0}, 4096),
        ({"rope_type": "linear", "factor": 2.0}, 2048),
    ],
)
def test_a_scaled_context_is_counted_as_peers_count_it(
    scaling: dict[str, Any], context: int
) -> None:
    spec = ModelSpec.from_config({**SHAPE, "rope_scaling": scaling})

    assert (spec.max_position, spec.trained_position) == (context, 1024)


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"rope_type": "longrope", "factor": 4.0}, "rope_type='longrope' is unknown"),
        ({"rope_type": "yarn"}, "factor=None must be a positive number"),
        ({"rope_type": "yarn", "factor": "4"}, "factor='4' must be a positive number"),
        ({"rope_type": "llama3", "factor": 8.0}, "low_freq_factor=None"),
        ({"full_attention": {"rope_type": "default"}, "x": {}}, "differs between kinds of layers"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    ],
)
def test_rotary_settings_that_cannot_be_served_are_named(
    scaling: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        ModelSpec.from_config({**SHAPE, "rope_scaling": scaling})


async def test_stretched_and_overlong_contexts_are_told(
    model: Path, start_worker: Any, caplog: Any
) -> None:
    change(model / "config.json", rope_parameters={**YARN, "rope_theta": 1e4})

    worker = await start_worker(weights=model, max_model_len=5000, num_kv_blocks=100)

    assert "yarn scaling by 4.0 stretches a context of 1024 tokens to 4096" in caplog.text
    (note,) = worker.load()["notes"]
    assert note.startswith("max_model_len=5000 is beyond the 4096 tokens")
    assert note.endswith("set maxModelLen to 4096 or less")
    assert note in caplog.text


async def test_a_context_that_the_kv_cache_cannot_hold_is_told(
    model: Path, start_worker: Any
) -> None:
    worker = await start_worker(weights=model, max_model_len=1000, num_kv_blocks=10)

    (note,) = worker.load()["notes"]
    held = worker.max_model_len
    assert f"max_model_len=1000 does not fit: the KV cache holds {held} tokens" in note


# -- what is refused, by name ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "deepseek_v3", "n_routed_experts": 8}, "mixture of experts of a kind"),
        (
            {"model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 3},
            "num_experts_per_tok=3 is above num_local_experts=2",
        ),
        (
            {"model_type": "mixtral", "quantization_config": {"quant_method": "fp8"}},
            "a quantized mixture of experts",
        ),
        ({"model_type": "qwen2_vl"}, "model_type='qwen2_vl' is not supported"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "no language model with a head"),
        (
            {"quantization_config": {"quant_method": "bitsandbytes"}},
            "quant_method='bitsandbytes'",
        ),
        ({"num_hidden_layers": 500_000_000}, "num_hidden_layers=500000000 is above 1024"),
        ({"vocab_size": 10**4000}, "vocab_size=1000.*is above"),
        ({"max_position_embeddings": 2**40}, "max_position_embeddings"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan"),
        (
            {
                "model_type": "qwen3",
                "sliding_window": 4,
                "use_sliding_window": True,
                "layer_types": ["linear_attention"] * 3,
            },
            "layer_types holds 'linear_attention'",
        ),
    ],
)
def test_what_a_config_asks_for_in_vain_is_one_sentence(
    values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        ModelSpec.from_config({**SHAPE, **values})

    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"model.gguf": b""}, "holds GGUF"),
        ({"pytorch_model.bin": b""}, r"PyTorch pickles"),
        ({"adapter_config.json": b"{}", "adapter_model.safetensors": b""}, "an adapter alone"),
        ({"model.safetensors": b"", "config.json": b"{}", "tokenizer.model": b""}, "the slow form"),
        ({}, r"holds no \.safetensors file"),
    ],
)
async def test_a_directory_of_another_format_is_named_at_the_start(
    tmp_path: Path, start_worker: Any, files: dict[str, bytes], message: str
) -> None:
    for name, body in files.items():
        (tmp_path / name).write_bytes(body)

    with pytest.raises(WorkerError, match=message):
        await start_worker(weights=tmp_path)


# -- files that attack -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    ["[" * 200_000, '{"a":' * 200_000, "[]", "", "{", "nul", '{"a": ' + "9" * 5000 + "}"],
)
def test_json_that_is_none_is_one_sentence(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)

    with pytest.raises(ModelError, match=r"config\.json"):
        read_json(path)


def test_a_file_without_end_is_not_read_to_it(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(2**40)

    with pytest.raises(ModelError, match="larger than 4 MiB"):
        read_json(path)


@pytest.mark.parametrize("name", ["config.json", "chat_template.jinja", "tokenizer.json"])
def test_a_link_out_of_the_folder_is_not_followed(model: Path, tmp_path: Path, name: str) -> None:
    """The peer token was once read through a linked template."""
    secret = tmp_path / "token"
    secret.write_text("secret")
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(secret)

    reader = ModelSpec.load if name == "config.json" else Tokenizer
    with pytest.raises(ModelError, match="leaves the weights folder"):
        reader(model)


def test_the_hubs_own_cache_is_made_of_links_and_is_read(tmp_path: Path) -> None:
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "blobs" / "1").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/1")

    path = locate(snapshot, "config.json")

    assert path is not None
    assert read_json(path) == {}


def test_a_pipe_in_place_of_a_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")

    with pytest.raises(ModelError, match="no regular file"):
        locate(tmp_path, "config.json")


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_a_damaged_weights_file_is_one_sentence_or_loads(
    tiny_llama: Path, tmp_path: Path, data: st.DataObject
) -> None:
    whole = (tiny_llama / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    header = bytearray(whole[: 8 + length])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(header) - 1))
        header[at] = data.draw(st.integers(0, 255))
    cut = data.draw(st.sampled_from([len(whole), len(whole) - 1, 8 + length, 8, 0]))
    damaged = (bytes(header) + whole[8 + length :])[:cut]
    shutil.copy(tiny_llama / "config.json", tmp_path)
    shutil.copy(tiny_llama / "tokenizer.json", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(damaged)
    spec = ModelSpec.load(tmp_path)

    with contextlib.suppress(ModelError):
        load_weights(spec, tmp_path, dtype=torch.float32, device=torch.device("cpu"))


# -- chat templates --------------------------------------------------------------------------------


def render(source: str, **variables: Any) -> str:
    template = ChatTemplate(source, timeout_s=1.5)
    try:
        return template.render({"messages": [{"role": "user", "content": "hi"}], **variables})
    finally:
        template.close()


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}!", "hi!"),
        ("{{ {'b': 1, 'a': 'ü'} | tojson(sort_keys=true) }}", '{"a": "ü", "b": 1}'),
        ("{{ {'a': 'ü'} | tojson(ensure_ascii=True) }}", '{"a": "\\u00fc"}'),
        ("{{ {'a': 1} | tojson(indent=2) }}", '{\n  "a": 1\n}'),
        ("{{ {'a': 1, 'b': 2} | tojson(separators=(',', ':')) }}", '{"a":1,"b":2}'),
        ("{% for x in [1, 2, 3] %}{% if x == 2 %}{% break %}{% endif %}{{ x }}{% endfor %}", "1"),
    ],
)
def test_what_published_templates_use_renders(source: str, text: str) -> None:
    assert render(source) == text


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for", "cannot be read"),
        ("{{ messages | unknown }}", "cannot be read"),
        ("{{ raise_exception('no system role') }}", "refuses the messages: no system role"),
        ("{{ messages[7].x.y }}", "chat template"),
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "runs too long",
        ),
        ("{{ 'x' * 2000000000 }}", "too much memory|too long"),
        (
            "{% set ns = namespace(x='x') %}{% for i in range(40) %}{% set ns.x = ns.x ~ ns.x %}"
            "{% endfor %}{{ ns.x }}",
            "too much memory|too long",
        ),
        ("{{ 'x' * 40000000 }}", "makes more than 32 MiB|too long"),
        ("{{ 10 ** (10 ** 10) }}", "too|cannot be read"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
        ("{{ ''.__class__.__mro__ }}", "refuses"),
        ("{{ cycler.__init__.__globals__ }}", "refuses"),
        ("(" * 5 + "{{" + "(" * 20000 + "}}", "chat template"),
    ],
)
def test_a_template_that_breaks_or_attacks_refuses_its_request(source: str, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        render(source)

    assert caught.value.status == 400


def test_a_template_that_was_lost_once_renders_the_next_request() -> None:
    template = ChatTemplate(
        "{% if loop_ %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}"
        "{% endfor %}{% endif %}ok",
        timeout_s=1.0,
    )

    with pytest.raises(RequestError, match="runs too long"):
        template.render({"loop_": True})

    assert template.render({"loop_": False}) == "ok"
    template.close()


async def test_a_broken_template_stops_chat_only(model: Path, start_worker: Any) -> None:
    (model / "chat_template.jinja").write_text("{% for")
    worker = await start_worker(weights=model)

    async with httpx.AsyncClient(base_url=worker.url) as client:
        messages = [{"role": "user", "content": "hi"}]
        chat = await client.post("/v1/chat/completions", json={"messages": messages})
        plain = await client.post("/v1/completions", json={"prompt": "hi", "max_tokens": 2})

    assert chat.status_code == 400
    assert "cannot be read" in chat.json()["error"]["message"]
    assert plain.status_code == 200


# -- regular expressions of tokenizers -------------------------------------------------------------

PUBLISHED = [
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t)?|\s+",
    r"(?:\r?\n)+| {2,}|[()+*]+",
]


def _with_pattern(model: Path, pattern: str) -> None:
    data = json.loads((model / "tokenizer.json").read_text())
    split = {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    data["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, level]}
    (model / "tokenizer.json").write_text(json.dumps(data))


@pytest.mark.parametrize("pattern", PUBLISHED)
def test_published_patterns_are_used(model: Path, pattern: str) -> None:
    _with_pattern(model, pattern)

    tokenizer = Tokenizer(model)

    assert tokenizer.decode(tokenizer.encode("the quick fox")) == "the quick fox"


@pytest.mark.parametrize("pattern", [r"(a+)+$", r"(?:x*)*y", r"((\s|\d)+,?)*!", r"(\w{2,}){3,}z"])
def test_patterns_of_exponential_time_are_refused(model: Path, pattern: str) -> None:
    _with_pattern(model, pattern)

    with pytest.raises(ModelError, match="repeats a repetition"):
        Tokenizer(model)


def _edited(model: Path, **parts: Any) -> None:
    path = model / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **parts}))


REPLACE = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 40}


@pytest.mark.parametrize(
    ("parts", "why"),
    [
        ({"normalizer": {"type": "Prepend", "prepend": "x" * 5000}}, "around every text"),
        ({"normalizer": REPLACE | {"content": "a" * 100}}, "characters of one"),
        ({"normalizer": {"type": "Sequence", "normalizers": [REPLACE, REPLACE]}}, "1600 char"),
        (
            {
                "post_processor": {
                    "type": "TemplateProcessing",
                    "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 2000,
                    "pair": [],
                    "special_tokens": {},
                }
            },
            "around every text",
        ),
    ],
    ids=["prepend", "replace", "replacements", "template"],
)
def test_a_tokenizer_that_makes_much_of_little_is_refused(
    model: Path, parts: dict[str, Any], why: str
) -> None:
    """Its memory would be the worker's, and the end of that the worker's end."""
    _edited(model, **parts)

    with pytest.raises(ModelError, match=why):
        Tokenizer(model)


def test_an_escaped_name_does_not_hide_a_pattern(model: Path) -> None:
    _with_pattern(model, r"(a+)+$")
    path = model / "tokenizer.json"
    path.write_text(path.read_text().replace('"Regex"', '"\\u0052egex"'))

    with pytest.raises(ModelError, match="repeats a repetition"):
        Tokenizer(model)


def test_a_pattern_that_gives_up_on_a_text_refuses_the_request_alone(model: Path) -> None:
    """The library panics, which is no Exception."""
    _with_pattern(model, r"(a|a|aa)+$")
    tokenizer = Tokenizer(model)

    with pytest.raises(RequestError, match="gives up on this text"):
        tokenizer.encode("a" * 5000 + "b")
    assert tokenizer.encode("the quick fox")
