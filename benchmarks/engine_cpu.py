"""What the engine makes of one core: beside transformers, and beside what the core could do.

    python benchmarks/engine_cpu.py [--layers 8] [--rounds 7] [--json FILE]

A random model of Qwen2.5-0.5B's shape in bfloat16, made and deleted by the script. CPU seconds of
one thread, so that other work on the machine matters little; ours and transformers take turns, and
the least of the rounds counts. Two limits are measured in the same run: reading every weight once
(decoding alone cannot be faster) and the faster of the core's bfloat16 and float32 products.
Scheduling and packing a step of 256 running sequences are wall time.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tandem_worker.config import WorkerConfig
from tandem_worker.engine.packing import BlockRow, pack
from tandem_worker.engine.requests import EngineRequest, Work
from tandem_worker.engine.runner import ModelRunner
from tandem_worker.engine.sampling import SamplingParams
from tandem_worker.scheduling.kv_blocks import BlockManager
from tandem_worker.scheduling.ranking import Order
from tandem_worker.scheduling.scheduler import Scheduler, SchedulerLimits
from tandem_worker.scheduling.sequence import Chunk, Sequence

HIDDEN, INNER, VOCABULARY = 896, 4864, 151_936
CONTEXT = 256
"""Tokens before the one that a decode computes."""
BLOCKS = 20
"""KV blocks of each sequence."""

Task = Callable[[], object]


def least(tasks: dict[str, Task], rounds: int) -> dict[str, float]:
    """CPU milliseconds of each task, the least of interleaved rounds."""
    for task in tasks.values():
        task()
    best = dict.fromkeys(tasks, float("inf"))
    for _ in range(rounds):
        for name, task in tasks.items():
            started = time.process_time()
            task()
            best[name] = min(best[name], 1e3 * (time.process_time() - started))
    return best


def save_model(folder: Path, layers: int) -> Any:
    """transformers' own model of the shape, and its files in ``folder``."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=layers,
        num_attention_heads=14,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    model = Qwen2ForCausalLM(config).to(torch.bfloat16).eval()
    model.save_pretrained(folder)
    return model


def prompt(number: int, length: int) -> list[int]:
    return [(7 * number + 31 * position) % 150_000 for position in range(length)]


def work_of(number: int, start: int, end: int) -> Work:
    """Positions ``start .. end`` of a sequence with blocks of its own."""
    blocks = list(range(number * BLOCKS, (number + 1) * BLOCKS))
    sequence = Sequence(str(number), prompt(number, end), end, block_ids=blocks)
    request = EngineRequest(sequence, SamplingParams(temperature=0.0), lambda event: None)
    return Work(Chunk(sequence, start, end - start), request)


def our_decode(runner: ModelRunner, batch: int) -> Task:
    work = [work_of(number, CONTEXT, CONTEXT + 1) for number in range(batch)]
    return lambda: runner.execute(work, batch)


def their_decode(model: Any, batch: int) -> Task:
    with torch.inference_mode():
        prompts = torch.tensor([prompt(number, CONTEXT) for number in range(batch)])
        cache = model(prompts, use_cache=True, logits_to_keep=1).past_key_values
    token = torch.ones(batch, 1, dtype=torch.long)

    def decode() -> object:
        with torch.inference_mode():
            out = model(token, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache.crop(-1)
            return out.logits.argmax(-1).tolist()

    return decode


def our_prefill(runner: ModelRunner, length: int) -> Task:
    work = [work_of(0, 0, length)]
    return lambda: runner.execute(work, 0)


def their_prefill(model: Any, length: int) -> Task:
    tokens = torch.tensor([prompt(0, length)])

    def prefill() -> object:
        with torch.inference_mode():
            out = model(tokens, use_cache=True, logits_to_keep=1)
            return out.logits.argmax(-1).tolist()

    return prefill


def limits(model: Any, rounds: int) -> dict[str, float]:
    """Milliseconds to read all weights once, and GFLOP/s of a product of a layer's size."""
    num_bytes = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    memory = torch.ones(num_bytes // 8, dtype=torch.int64)
    x, weight = torch.randn(512, HIDDEN), torch.randn(2 * INNER, HIDDEN)
    narrow_x, narrow = x.bfloat16(), weight.bfloat16()
    times = least(
        {
            "read": memory.sum,
            "float32": lambda: torch.nn.functional.linear(x, weight),
            "bfloat16": lambda: torch.nn.functional.linear(narrow_x, narrow),
        },
        rounds,
    )
    operations = 2 * x.shape[0] * weight.numel()
    return {
        "read_all_weights_ms": times["read"],
        "float32_gflops": operations / times["float32"] / 1e6,
        "bfloat16_gflops": operations / times["bfloat16"] / 1e6,
    }


def model_figures(layers: int, rounds: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="engine-cpu-") as folder:
        theirs = save_model(Path(folder), layers)
        config = WorkerConfig(
            served_model="m", device="cpu", num_threads=1, num_kv_blocks=16 * BLOCKS
        )
        ours = ModelRunner(config, Path(folder))
        bounds = limits(theirs, rounds)
        rate = 1e9 * max(bounds["float32_gflops"], bounds["bfloat16_gflops"])
        figures: dict[str, Any] = {"dtype": str(ours.dtype), "limits": bounds, "tasks": {}}
        layer_weights = sum(p.numel() for p in theirs.model.layers.parameters())
        for name, own, peer, bound_ms in (
            *(
                (
                    f"decode {batch} at a time",
                    our_decode(ours, batch),
                    their_decode(theirs, batch),
                    bounds["read_all_weights_ms"],
                )
                for batch in (1, 4, 16)
            ),
            *(
                (
                    f"prefill {length}",
                    our_prefill(ours, length),
                    their_prefill(theirs, length),
                    1e3 * 2 * layer_weights * length / rate,
                )
                for length in (512, 1024)
            ),
        ):
            times = least({"ours": own, "transformers": peer}, rounds)
            figures["tasks"][name] = {
                **{f"{who}_ms": round(ms, 2) for who, ms in times.items()},
                "times_transformers": round(times["transformers"] / times["ours"], 2),
                "share_of_limit": round(bound_ms / times["ours"], 2),
            }
        return figures


def step_figures(rounds: int, order: Order = "fcfs") -> dict[str, float]:
    """CPU microseconds of a step of 256 decodes with 512 requests waiting, at best."""
    scheduler = Scheduler(
        BlockManager(20_000),
        SchedulerLimits(max_num_seqs=256, max_batched_tokens=8192),
        order=order,
    )
    for number in range(768):
        tokens = list(range(number, number + 200))
        scheduler.add(Sequence(str(number), tokens, 200, arrival_s=1e-3 * number), 0.0)
    rows = {str(number): BlockRow() for number in range(768)}
    best = dict.fromkeys(("schedule_us", "advance_us", "pack_us"), float("inf"))
    for number in range(20 + 40 * rounds):
        times = [time.process_time()]
        step = scheduler.schedule(1.0 + number)
        times.append(time.process_time())
        pack(step.chunks, [rows[c.sequence.request_id] for c in step.chunks], step.num_decodes)
        times.append(time.process_time())
        scheduler.advance(step)
        times.append(time.process_time())
        for chunk in step.chunks:
            if chunk.samples:
                chunk.sequence.token_ids.append(5)
        if step.num_decodes == 256:
            took = [1e6 * (end - start) for start, end in zip(times, times[1:], strict=False)]
            for name, value in zip(("schedule_us", "pack_us", "advance_us"), took, strict=True):
                best[name] = min(best[name], round(value, 1))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8, help="of the model (default 8)")
    parser.add_argument("--rounds", type=int, default=7, help="of each task (default 7)")
    parser.add_argument("--json", type=Path, help="write the figures there")
    arguments = parser.parse_args()
    figures = {
        "machine": f"{torch.cpu.get_capabilities()['cpu_name']}, {platform.machine()}, one thread",
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "date": time.strftime("%Y-%m-%d"),
        "step_of_256": step_figures(arguments.rounds),
        "step_of_256_mlfq": step_figures(arguments.rounds, "mlfq"),
        "model": model_figures(arguments.layers, arguments.rounds),
    }
    text = json.dumps(figures, indent=1)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
