"""Targets that read a file: resources, checkpoints, tokenizers, artifacts, prompts, traces."""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from fuzzing import ROOT, Target

SPLIT = b"\n==\n"
SMALL = ROOT / "examples" / "models" / "small"


@contextmanager
def frames() -> Iterator[tuple[Target, list[bytes]]]:
    """What comes first on the KV port: header and fields of one frame after the other."""
    from tandem_worker.transfer.errors import TransferError
    from tandem_worker.transfer.frame_reader import decode_header, decode_meta
    from tandem_worker.transfer.frames import (
        HEADER_BYTES,
        Abort,
        Challenge,
        Credit,
        Error,
        Frame,
        Open,
        Opened,
        Stopped,
        encode,
    )

    known: list[Frame] = [
        Challenge(2, 2, b"n" * 16),
        Open(push=1, epoch=2, request_id="request", probe=False),
        Opened(1, 4096, 4096),
        Credit(1, 100),
        Abort(1, 3, "why"),
        Stopped(1),
        Error(2, "why"),
    ]

    def read(data: bytes) -> None:
        at = 0
        try:
            while at + HEADER_BYTES <= len(data):
                header = decode_header(data[at : at + HEADER_BYTES])
                at += HEADER_BYTES
                meta = data[at : at + header.meta_length]
                if len(meta) < header.meta_length:
                    return
                decode_meta(header, meta)
                at += header.meta_length
        except TransferError:
            return

    yield read, [encode(frame) for frame in known]


@contextmanager
def resources() -> Iterator[tuple[Target, list[bytes]]]:
    """A file of resources as `tandem up` reads it, then each as the operator allows and plans it.

    By an installation that allows nothing, and by one that allows all.
    """
    from tandem_operator.manifests import ManifestError, load_text
    from tandem_operator.plan import Settings, plan_model, plan_router
    from tandem_operator.plan.decode import parse
    from tandem_operator.plan.permissions import refusals, secrets_of
    from tandem_operator.resources import Model, Router
    from tandem_operator.resources.allow_list import AllowList

    closed = Settings(allow=AllowList(), own_namespace="tandem-system")

    def read(data: bytes) -> None:
        try:
            found = load_text(data.decode("utf-8", errors="replace"), "fuzzed", ROOT)
        except ManifestError:
            return
        known = [m.obj for m in found if m.kind in ("Model", "Router", "AutoscalingPolicy")]
        parsed = [
            parse({**o, "metadata": {"namespace": "default", **o["metadata"]}}) for o in known
        ]
        models = {each.metadata.name: each for each in parsed if isinstance(each, Model)}
        routers = [each for each in parsed if isinstance(each, Router)]
        for each in (*models.values(), *routers):
            refusals(each, closed, dict.fromkeys(secrets_of(each).values()))
        for model in models.values():
            plan_model(model, [], [], Settings(), "token")
        for router in routers:
            plan_router(router, models, routers, Settings(), "token")

    found = sorted((ROOT / "examples").glob("*/*.yaml"))
    patch = "containers: [{name: worker, env: [{name: A, value: b}]}], volumes: [{name: x}]"
    patched = (
        "apiVersion: tandem.dev/v1alpha1\nkind: Model\nmetadata: {name: m}\nspec:\n"
        "  weights: {source: hf://a/b, secretRef: {name: s}}\n  image: vllm/vllm-openai:v0.11.0\n"
        "  engine: {type: VLLM, args: {max-loras: '2'}, adapters: [{name: a, source: hf://a/c}]}\n"
        f"  unified: {{replicas: 1, podPatch: {{spec: {{{patch}}}}}}}\n"
    )
    yield read, [*(path.read_bytes() for path in found), patched.encode()]


@contextmanager
def checkpoints() -> Iterator[tuple[Target, list[bytes]]]:
    """config.json, generation_config.json and the head of the weights, as a worker loads them."""
    import torch

    from tandem_worker.errors import WorkerError
    from tandem_worker.models.checkpoint import load_weights
    from tandem_worker.models.files import read_json
    from tandem_worker.models.spec import ModelSpec, sampling_defaults

    weights = (SMALL / "model.safetensors").read_bytes()
    head = 8 + int.from_bytes(weights[:8], "little")

    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "model"
        shutil.copytree(SMALL, copy)

        def read(data: bytes) -> None:
            config, _, rest = data.partition(SPLIT)
            generation, _, start = rest.partition(SPLIT)
            (copy / "config.json").write_bytes(config)
            (copy / "generation_config.json").write_bytes(generation)
            (copy / "model.safetensors").write_bytes(start + weights[head:])
            try:
                spec = ModelSpec.load(copy)
                sampling_defaults(read_json(copy / "generation_config.json"), "fuzzed")
                load_weights(spec, copy, dtype=torch.float32, device=torch.device("cpu"))
            except WorkerError:
                return

        config = (SMALL / "config.json").read_bytes()
        generation = (SMALL / "generation_config.json").read_bytes()
        whole = json.loads(config)
        rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
        quantized = {"quant_method": "compressed-tensors", "format": "int-quantized"}
        others = ({"rope_scaling": rope}, {"quantization_config": quantized}, {"num_experts": 4})
        configs = [config, *(json.dumps({**whole, **more}).encode() for more in others)]
        yield read, [SPLIT.join((each, generation, weights[:head])) for each in configs]


@contextmanager
def formats() -> Iterator[tuple[Target, list[bytes]]]:
    """A folder that holds what no worker loads: a GGUF, an adapter, pickles, an index of shards."""
    import torch

    from tandem_worker.errors import WorkerError
    from tandem_worker.models.checkpoint import load_weights
    from tandem_worker.models.files import check_formats, names_in
    from tandem_worker.models.spec import ModelSpec

    gguf = b"GGUF" + (3).to_bytes(4, "little") + b"\x00" * 16
    adapter = b'{"peft_type": "LORA", "r": 8, "base_model_name_or_path": "a/b"}'
    index = b'{"metadata": {}, "weight_map": {"model.norm.weight": "model.safetensors"}}'
    seeds = [(b"model.gguf", gguf), (b"adapter_config.json", adapter)]
    seeds += [(b"pytorch_model.bin", b"\x80\x04."), (b"model.safetensors.index.json", index)]

    with tempfile.TemporaryDirectory() as folder:
        for name in ("config.json", "tokenizer.json", "model.safetensors"):
            shutil.copy(SMALL / name, Path(folder) / name)
        kept = names_in(Path(folder))

        def read(data: bytes) -> None:
            name, _, content = data.partition(SPLIT)
            named = "".join(
                c for c in name.decode("ascii", "ignore") if c.isprintable() and c != "/"
            )
            path = Path(folder) / (named[:200].strip(".") or "x")
            if path.name in kept:
                return
            path.write_bytes(content)
            for names in (names_in(Path(folder)), {path.name}):
                try:
                    check_formats(names, "fuzzed")
                    spec = ModelSpec.load(Path(folder))
                    load_weights(
                        spec, Path(folder), dtype=torch.float32, device=torch.device("cpu")
                    )
                except WorkerError:
                    continue
            path.unlink()

        yield read, [SPLIT.join(each) for each in seeds]


@contextmanager
def tokenizers() -> Iterator[tuple[Target, list[bytes]]]:
    """tokenizer_config.json, a chat template and tokenizer.json, then a chat rendered by them."""
    from tandem_worker.errors import WorkerError
    from tandem_worker.tokenization.tokenizer import Tokenizer

    parts = ("tokenizer_config.json", "chat_template.jinja", "tokenizer.json")
    turns = [{"role": "user", "content": "12 + 30"}]
    turns += [{"role": "assistant", "content": "<think>a</think>42"}]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]

    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)

        def read(data: bytes) -> None:
            for name, content in zip(parts, data.split(SPLIT, 2), strict=False):
                (copy / name).write_bytes(content)
            try:
                tokenizer = Tokenizer(copy)
                for more in ({}, {"tools": tools}):
                    ids = tokenizer.encode(tokenizer.render_chat(turns, **more))
                    tokenizer.decode(ids[:50])
            except WorkerError:
                return

        whole = [(SMALL / name).read_bytes() for name in parts]
        # As many words as a mutation may hit; the file's own are 50 kB of the same.
        known = json.loads(whole[2])
        words = dict(itertools.islice(known["model"]["vocab"].items(), 300))
        known["model"] |= {"vocab": words, "merges": []}
        less = json.dumps(known).encode()
        loop = b"{% for m in messages %}{{ m.role + ': ' + m.content }}{% endfor %}"
        config = json.dumps({**json.loads(whole[0]), "chat_template": [
            {"name": "default", "template": loop.decode()}, {"name": "tool_use", "template": "a"}
        ]}).encode()  # fmt: skip
        yield read, [SPLIT.join(whole), SPLIT.join((config, loop, less))]


@contextmanager
def artifacts() -> Iterator[tuple[Target, list[bytes]]]:
    """A predictor's file, and one prompt for what is still a predictor."""
    from tandem_router.predictor.errors import PredictorError
    from tandem_router.predictor.runtime import loads

    whole = (ROOT / "examples" / "01-hybrid" / "predictor").read_bytes()
    head = 8 + int.from_bytes(whole[:8], "little")

    def read(data: bytes) -> None:
        start, cut, numbers = data.partition(SPLIT)
        try:
            loads(start + (numbers if cut else b"") + whole[head + len(numbers) :]).score(
                "12 + 30?"
            )
        except PredictorError:
            return

    yield read, [whole[:head], whole[:head] + SPLIT + whole[head : head + 4096]]


@contextmanager
def prompts() -> Iterator[tuple[Target, list[bytes]]]:
    """What `tandem train` and `tandem grade` are given, under each name that says what it is."""
    import gzip

    from tandem_router.grading import prompts as grading
    from tandem_router.grading.errors import GradingError
    from tandem_router.predictor.errors import PredictorError
    from tandem_router.predictor.records.dataset import read_dataset, read_prompts

    turn = [{"role": "user", "content": "12 + 30"}]
    row = {"prompt": "12 + 30?", "quality": {"small": 1, "large": [0, 1]}, "group": "a"}
    row |= {"output_tokens": {"small": 4, "large": 9}, "cost_usd": {"small": 1e-6}, "task": "t"}
    arena = {"conversation_a": turn, "conversation_b": turn, "winner": "model_a"}
    asked = {"id": 1, "messages": turn, "reference": "42", "grader": "number"}
    lines = b"".join(json.dumps(each).encode() + b"\n" for each in (row, row, asked, arena))
    table = b"prompt,quality.small,quality.large,reference,id\n12 + 30?,1,0,42,a\nb,0,1,3,c\n"
    seeds = {".jsonl": lines, ".json": json.dumps([row, asked]).encode(), ".csv": table}
    seeds |= {".tsv": table.replace(b",", b"\t"), ".txt": b"12 + 30?\nWhat is love?\n"}
    seeds |= {".jsonl.gz": gzip.compress(lines, mtime=0)}

    with tempfile.TemporaryDirectory() as folder:

        def read(data: bytes) -> None:
            suffix, _, content = data.partition(SPLIT)
            kind = suffix.decode("latin-1")
            path = Path(folder) / f"fuzzed{kind if kind in seeds else '.jsonl'}"
            path.write_bytes(content)
            for reader in (read_dataset, read_prompts, grading.read):
                try:
                    given: Any = [path] if reader is read_dataset else str(path)
                    found = reader(given)
                    if reader is read_prompts:  # which reads as it is asked
                        list(itertools.islice(found, 100))
                except (PredictorError, GradingError):
                    continue

        yield read, [SPLIT.join((kind.encode(), data)) for kind, data in seeds.items()]


@contextmanager
def labels() -> Iterator[tuple[Target, list[bytes]]]:
    """Gold labels as `tandem labels gold` reads them, and rows as `export` writes a router's."""
    from tandem_operator.cli import labels as command
    from tandem_operator.cli.errors import CommandError

    gold = {"request_id": "r", "quality": {"small": 1.0}, "probability": 0.5}
    kept = {"request_id": "r", "prompt": "12 + 30", "quality": {"small": 1.0}, "at": 1.0}
    kept |= {"source": "judge", "tier": "small", "output_tokens": {"small": 4}, "probability": 1.0}

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "gold.jsonl"
        parser = argparse.ArgumentParser()
        command.register(parser.add_subparsers())
        arguments = parser.parse_args(["labels", "gold", str(path), "--json"])

        def read(data: bytes) -> None:
            path.write_bytes(data)
            told = {"num_taken": 1, "unknown": []}
            with (
                mock.patch.object(command, "call", return_value=told),
                contextlib.suppress(CommandError),
                contextlib.redirect_stdout(io.StringIO()),
            ):
                arguments.run(arguments)

        yield read, [json.dumps(each).encode() + b"\n" for each in (gold, kept)]


@contextmanager
def traces() -> Iterator[tuple[Target, list[bytes]]]:
    """A trace, outcomes and a profile as `tandem simulate` reads them, and what comes of them."""
    from tandem_operator.cli import simulate
    from tandem_operator.cli.errors import CommandError

    own = {"at_s": 0.0, "prompt_tokens": 40, "output_tokens": {"small": 3, "large": 4}}
    own |= {"quality": {"small": 0.5}, "predicted": {"small": 0.5}, "prefix": [1, 2], "tier": None}
    mooncake = {"timestamp": 5, "input_length": 9, "output_length": 3, "hash_ids": [1, 2]}
    azure = b"TIMESTAMP,ContextTokens,GeneratedTokens\n2026-01-01 00:00:00.5,9,3\n"
    seeds = [json.dumps(own).encode() + b"\n", json.dumps(mooncake).encode() + b"\n", azure]
    seeds += [b"timestamp_s,input_tokens,output_tokens\n0.5,10,3\n1.5,9,2\n"]
    outcome = json.dumps(
        {"prompt": "a", "quality": {"small": 1}, "output_tokens": {"small": 3}, "predicted": None}
    ).encode()
    profile = json.dumps(
        {"prefill": [0.01, 1e-4, 0], "decode": [0.01, 1e-6, 1e-4], "kv_tokens": 4096}
    ).encode()

    with tempfile.TemporaryDirectory() as folder:
        at = Path(folder)

        def read(data: bytes) -> None:
            trace, _, rest = data.partition(SPLIT)
            outcomes, _, profiled = rest.partition(SPLIT)
            for name, content in (("t", trace), ("o", outcomes), ("p", profiled)):
                (at / name).write_bytes(content)
            parser = argparse.ArgumentParser()
            simulate.register(parser.add_subparsers())
            given = ["simulate", str(ROOT / "examples/01-hybrid/hybrid.yaml"), str(at / "t")]
            given += ["--profile", f"small={at / 'p'}", "--profile", f"large={at / 'p'}"]
            given += ["--outcomes", str(at / "o")] if outcomes else []
            given += ["--limit", "20", "--fixed", "--json", str(at / "said")]
            with contextlib.suppress(CommandError), contextlib.redirect_stdout(io.StringIO()):
                simulate.run(parser.parse_args(given))

        yield (
            read,
            [SPLIT.join((trace, more, profile)) for trace in seeds for more in (b"", outcome)],
        )
