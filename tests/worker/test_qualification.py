"""A model with lossy settings serves only while its answers stay near those of the exact one."""

from __future__ import annotations

import json
import math
import runpy
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from tandem_operator.cli import main as tandem
from tandem_worker import cli
from tandem_worker.config import WorkerConfig
from tandem_worker.engine.qualification import (
    ExactAnswer,
    Qualification,
    answer_exactly,
    loss_of,
    qualify,
)
from tandem_worker.engine.runner import ModelRunner
from tandem_worker.engine.tensor_parallel import TensorParallelRunner
from tandem_worker.errors import ModelError, UnqualifiedError
from tandem_worker.models.exact_answers import read_exact_answers, write_exact_answers
from tandem_worker.models.files import EXACT_ANSWERS
from tandem_worker.server.exact_answers import PROMPTS, asked
from tandem_worker.tokenization.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
QUANTIZE = ROOT / "examples" / "models" / "quantize.py"


def runner_of(directory: Path, **settings: Any) -> ModelRunner:
    config = {"served_model": "m", "num_kv_blocks": 4, "device": "cpu", "dtype": "float32"}
    read = WorkerConfig.model_validate({**config, **settings})
    return (ModelRunner if read.tensor_parallel == 1 else TensorParallelRunner)(read, directory)


def qualified(directory: Path, max_loss: float = 0.05, **settings: Any) -> Qualification:
    runner = runner_of(directory, **settings)
    try:
        tokenizer = Tokenizer(directory)
        return qualify(
            runner,
            lambda: [asked(tokenizer, text) for text in PROMPTS],
            directory,
            max_loss=max_loss,
        )
    finally:
        runner.close()


def quantized(directory: Path, to: Path, bits: int) -> Path:
    runpy.run_path(str(QUANTIZE))["write"](directory, to, bits)
    return to


def exact_answers(arguments: list[str]) -> int:
    """The status of ``tandem exact-answers``."""
    return tandem(["exact-answers", "--threads", "1", *arguments])


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory, build_model: Callable[..., Path]) -> Path:
    return build_model(tmp_path_factory.mktemp("exact"), "llama")


@pytest.fixture(scope="module")
def eight_bits(exact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized(exact, tmp_path_factory.mktemp("w") / "8", 8)


def test_exact_settings_are_asked_nothing(exact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ModelRunner, "execute", None)

    assert qualified(exact).state == "exact"


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_lossy_kv_blocks_are_held_against_the_models_own_exact_answers(
    exact: Path, kind: str
) -> None:
    said = qualified(exact, max_loss=0.5, kv_cache_dtype=kind)

    assert said.state == "within_loss"
    assert said.message.startswith(f"{kind} KV blocks: the perplexity of {len(PROMPTS)} exact")


def test_answers_that_lose_more_than_stated_end_the_worker(exact: Path) -> None:
    with pytest.raises(UnqualifiedError, match=r"fp8 KV blocks: .* \(at most \+0\.00%\).*max-loss"):
        qualified(exact, max_loss=0.0, kv_cache_dtype="fp8")


def test_the_loss_is_by_how_much_the_perplexity_rises(exact: Path) -> None:
    """Of an exact model's own answers it is nothing, and each nat per token multiplies it by e."""
    runner = runner_of(exact)
    answers = answer_exactly(runner, [asked(Tokenizer(exact), text) for text in PROMPTS[:3]])
    surer = [ExactAnswer(a.prompt, a.answer, tuple(p + 0.1 for p in a.logprobs)) for a in answers]

    same, worse = loss_of(runner, answers), loss_of(runner, surer)

    assert same.rise == pytest.approx(0.0, abs=1e-5)
    assert same.differing == 0.0
    assert worse.rise == pytest.approx(math.exp(0.1) - 1, abs=1e-4)


def test_exact_answers_are_what_the_model_writes_greedily(exact: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer = Tokenizer(exact)
    prompts = [asked(tokenizer, text) for text in PROMPTS[:2]]
    answers = answer_exactly(runner_of(exact), prompts, 8)

    peer = AutoModelForCausalLM.from_pretrained(exact, dtype=torch.float32)
    for prompt, found in zip(prompts, answers, strict=True):
        out = peer.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)
        assert list(found.answer) == out[0, len(prompt) :].tolist()


def test_quantized_weights_without_exact_answers_are_named_and_not_qualified(
    eight_bits: Path,
) -> None:
    said = qualified(eight_bits)

    assert said.state == "not_measured"
    assert "compressed-tensors weights: not measured, no exact_answers.json" in said.message
    assert "tandem exact-answers" in said.message

    both = qualified(eight_bits, max_loss=0.5, kv_cache_dtype="int8")

    assert both.state == "not_measured"
    assert "; int8 KV blocks: the perplexity" in both.message


def test_quantized_weights_are_held_against_their_originals_answers(
    exact: Path, eight_bits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    four_bits = quantized(exact, tmp_path / "four", 4)
    for directory in (eight_bits, four_bits):
        assert exact_answers([str(exact), "-o", str(directory / EXACT_ANSWERS)]) == 0
    try:
        good = qualified(eight_bits)
        with pytest.raises(UnqualifiedError, match="compressed-tensors weights: the perplexity"):
            qualified(four_bits)
    finally:
        (eight_bits / EXACT_ANSWERS).unlink()

    assert (good.state, "12 exact answers" in capsys.readouterr().out) == ("within_loss", True)


def test_a_narrower_dtype_than_the_checkpoints_is_a_lossy_setting(
    exact: Path, tmp_path: Path
) -> None:
    assert qualified(exact, dtype="bfloat16").message.startswith("float32 weights as bfloat16: not")

    path = exact / EXACT_ANSWERS
    assert exact_answers([str(exact), "-o", str(path)]) == 0
    try:
        assert qualified(exact, dtype="bfloat16", max_loss=0.5).state == "within_loss"
    finally:
        path.unlink()


def test_every_rank_computes_exactly_meanwhile(exact: Path) -> None:
    one, two = (
        qualified(exact, max_loss=0.5, kv_cache_dtype="int8", tensor_parallel=n) for n in (1, 2)
    )

    assert one == two


def test_weights_that_give_no_numbers_are_never_qualified(exact: Path) -> None:
    runner = runner_of(exact, kv_cache_dtype="int8")
    answer = ExactAnswer((5, 6), (7,), (-0.1,))
    runner.model.weights.lm_head.fill_(float("nan"))

    assert loss_of(runner, [answer]).rise == math.inf


def test_many_prompts_are_answered_in_bounded_memory(
    exact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = runner_of(exact)
    exact_kv, asked_for = runner.exact_kv, []

    def counted(num_blocks: int) -> AbstractContextManager[None]:
        asked_for.append(num_blocks)
        return exact_kv(num_blocks)

    monkeypatch.setattr(runner, "exact_kv", counted)
    long, short = [5] * 200, [7, 8]
    answers = answer_exactly(runner, [*[long, short] * 60], 2)

    assert asked_for == [255, 45]
    assert [answer.prompt for answer in answers] == [tuple(long), tuple(short)] * 60
    assert len(set(answers)) == 2


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[]", "expected an object"),
        ('{"answers": []}', "each of 1 to 1024 answers"),
        ('{"answers": [{"prompt": [1], "answer": [2], "logprobs": []}]}', r"answers\[0\]: each"),
        ('{"answers": [{"prompt": [], "answer": [2], "logprobs": [-1]}]}', "token ids, not empty"),
        ('{"answers": [{"prompt": [1], "answer": [2], "logprobs": [NaN]}]}', "at most 0"),
        ('{"answers": [{"prompt": [true], "answer": [2], "logprobs": [-1]}]}', "token ids"),
        ('{"answers": [{"prompt": [1], "answer": [9999], "logprobs": [-1]}]}', "another model's"),
        ('{"answers": [7]}', r"answers\[0\]: each"),
    ],
)
def test_a_file_of_answers_that_breaks_a_rule_is_named(
    content: str, said: str, tmp_path: Path
) -> None:
    (tmp_path / EXACT_ANSWERS).write_text(content)

    with pytest.raises(ModelError, match=said):
        read_exact_answers(tmp_path, 512)


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    answers = [ExactAnswer((1, 2), (3, 4), (-0.5, -0.0)), ExactAnswer((5,), (6,), (-1.25,))]
    write_exact_answers(tmp_path / EXACT_ANSWERS, answers, "m in float32")

    assert read_exact_answers(tmp_path, 512) == answers


def test_prompts_of_ones_own_are_asked(exact: Path, tmp_path: Path) -> None:
    asks, out = tmp_path / "asks.jsonl", tmp_path / "out.json"
    asks.write_text('{"prompt": "hello", "quality": {}}\n\n{"prompt": "the quick brown fox"}\n')
    command = [str(exact), "--max-tokens", "4", "--prompts", str(asks)]

    assert exact_answers([*command, "-o", str(out)]) == 0

    found = json.loads(out.read_text())["answers"]
    assert [len(entry["answer"]) <= 4 for entry in found] == [True, True]
    assert found[0]["prompt"] == asked(Tokenizer(exact), "hello")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "nowhere is not a directory"),
        (["EXACT", "--max-tokens", "0"], "--max-tokens 0 must be from 1 to 4096"),
        (["EXACT", "--prompts", "nowhere"], "--prompts nowhere cannot be read"),
        (["EXACT", "--prompts", "BAD"], 'line 1: must be {"prompt": "some text"}'),
        (["EXACT", "--prompts", "EMPTY"], "holds 0 prompts; give 1 to 1024"),
        (["EXACT", "--dtype", "bfloat16"], "float32 weights as bfloat16 are not exact"),
        (["EIGHT"], "compressed-tensors weights are not exact; name the original"),
        (["EXACT", "-o", "/nowhere/x"], "/nowhere/x cannot be written"),
    ],
)
def test_what_no_exact_answers_come_of_is_one_sentence(
    arguments: list[str],
    said: str,
    exact: Path,
    eight_bits: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "bad").write_text('{"text": "a"}\n')
    (tmp_path / "empty").write_text("\n")
    named = {"EXACT": exact, "EIGHT": eight_bits, "BAD": tmp_path / "bad"}
    named["EMPTY"] = tmp_path / "empty"

    status = exact_answers([*(str(named.get(text, text)) for text in arguments)])

    assert status == 1
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(("given", "told"), [([], 0.05), (["--max-loss", "0.5"], 0.5)])
def test_tandem_serve_takes_the_stated_loss(
    given: list[str], told: float, exact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []

    async def serve(config: WorkerConfig, weights: Path, **more: Any) -> int:
        seen.append(config.max_loss)
        return 0

    monkeypatch.setattr("tandem_worker.cli.serve.serve", serve)

    assert tandem(["serve", str(exact), "--threads", "1", *given]) == 0
    assert seen == [told]


async def test_a_worker_says_what_its_settings_cost(exact: Path, start_worker: Any) -> None:
    worker = await start_worker(kv_cache_dtype="int8", max_loss=0.5)

    said = worker.load()["qualification"]

    assert said["state"] == "within_loss"
    assert said["message"].startswith("int8 KV blocks: ")


def test_the_command_of_an_unqualified_worker_ends_with_65_and_the_sentence(
    exact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.json"
    config.write_text(
        json.dumps(
            {"served_model": "m", "dtype": "float32", "kv_cache_dtype": "fp8"}
            | {"max_loss": 0, "device": "cpu"}
        )
    )

    status = cli.main(["--config", str(config), "--weights", str(exact), "--port", "0"])

    assert status == cli.UNQUALIFIED == 65
    assert "tandem-worker: fp8 KV blocks: the perplexity" in capsys.readouterr().err
