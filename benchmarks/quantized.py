"""Task accuracy, bytes on disk and bytes in memory of the demo pair and its int8 and int4 versions.

    python benchmarks/quantized.py [--questions 480]

The versions are made by examples/models/quantize.py. Greedy answers to the test split's questions
through the worker's own engine in float32, on one thread; the interval is a 95 % one over
questions, of the difference to the unquantized model on the same questions.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
import tempfile
from pathlib import Path

from tandem_operator.demo.suite import Question, check, generate
from tandem_worker.config import WorkerConfig
from tandem_worker.engine.core import EngineCore
from tandem_worker.engine.requests import EngineRequest, TokenEvent
from tandem_worker.engine.runner import ModelRunner
from tandem_worker.engine.sampling import SamplingParams
from tandem_worker.scheduling.kv_blocks import BlockManager
from tandem_worker.scheduling.scheduler import Scheduler, SchedulerLimits
from tandem_worker.scheduling.sequence import Sequence
from tandem_worker.tokenization.tokenizer import Tokenizer

MODELS = Path(__file__).resolve().parents[1] / "examples" / "models"
MAX_TOKENS = 80


def answers(folder: Path, questions: list[Question]) -> tuple[list[bool], int]:
    """Which are right, and the bytes of the weights in memory."""
    config = WorkerConfig(
        served_model="m", dtype="float32", device="cpu", num_kv_blocks=256, max_num_seqs=64
    )
    runner, tokenizer = ModelRunner(config, folder), Tokenizer(folder)
    ends = runner.spec.eos_token_ids | tokenizer.eos_token_ids
    limits = SchedulerLimits(max_num_seqs=64, max_batched_tokens=1024)
    core = EngineCore(runner, Scheduler(BlockManager(256), limits), eos_token_ids=ends)
    written: list[list[int]] = [[] for _ in questions]
    for index, question in enumerate(questions):
        prompt = tokenizer.render_chat([{"role": "user", "content": question.prompt}])
        tokens = tokenizer.encode(prompt, add_special_tokens=False)

        def sink(event: object, to: list[int] = written[index]) -> None:
            if isinstance(event, TokenEvent):
                to.append(event.token_id)

        sequence = Sequence(str(index), list(tokens), len(tokens))
        sampling = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS)
        core.add(EngineRequest(sequence, sampling, sink))
    while core.has_work:
        for sink_, event in core.step():
            sink_(event)
    texts = [tokenizer.decode(ids) for ids in written]
    right = [check(q, text) for q, text in zip(questions, texts, strict=True)]
    return right, runner.model.weights.num_bytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=int, default=480)
    questions = generate("test", 1, parser.parse_args().questions)
    spec = importlib.util.spec_from_file_location("quantize", MODELS / "quantize.py")
    assert spec is not None
    assert spec.loader is not None
    quantize = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(quantize)
    print("| model | right | change | MB on disk | MB in memory (float32 engine) |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        for tier in ("small", "large"):
            whole: list[bool] = []
            for bits in (0, 8, 4):
                folder = MODELS / tier
                if bits:
                    folder = Path(scratch) / f"{tier}-{bits}"
                    quantize.write(MODELS / tier, folder, bits)
                right, num_bytes = answers(folder, questions)
                whole = whole or right
                changes = [int(a) - int(b) for a, b in zip(right, whole, strict=True)]
                mean = sum(changes) / len(changes)
                spread = 1.96 * math.sqrt(
                    sum((c - mean) ** 2 for c in changes) / max(1, len(changes) - 1) / len(changes)
                )
                disk = (folder / "model.safetensors").stat().st_size
                change = f"{mean:+.3f} ± {spread:.3f}" if bits else ""
                print(
                    f"| {tier}{f' int{bits}' if bits else ''} | {sum(right) / len(right):.3f} | "
                    f"{change} | {disk / 1e6:.2f} | {num_bytes / 1e6:.2f} |",
                    flush=True,
                )
    sys.stdout.flush()


if __name__ == "__main__":
    main()
