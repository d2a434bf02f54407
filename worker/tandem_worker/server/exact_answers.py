"""What a model is asked to learn its exact answers, and how these become a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tandem_worker.config import WorkerConfig
from tandem_worker.engine.qualification import answer_exactly, lossy_weights
from tandem_worker.engine.runner import ModelRunner
from tandem_worker.errors import RequestError, WorkerError
from tandem_worker.models.exact_answers import write_exact_answers
from tandem_worker.models.files import check_formats, names_in
from tandem_worker.tokenization.tokenizer import Tokenizer

PROMPTS = (
    "Question: What is the capital of France, and which river flows through it?\nAnswer:",
    "The water cycle begins when the sun warms the ocean. Then",
    "def fibonacci(n):\n    ",
    "Translate into German: Good morning, how are you today?\n",
    "A train leaves at 9:15 and arrives at 11:45. The journey takes",
    "Dear customer, thank you for your message about the delayed parcel.",
    "SELECT name, count(*) FROM orders WHERE",
    '{"city": "Oslo", "temperature": -3, "forecast": [',
    "Summarise in one sentence: The committee met on Tuesday and, after two hours, agreed to",
    "Once upon a time, in a village between two mountains, there lived",
    "12 + 30 = 42\n15 + 27 = 42\n18 + 24 =",
    "The three laws of thermodynamics say that",
)
"""What a worker asks itself where nobody has stored anything better."""


def asked(tokenizer: Tokenizer, text: str) -> list[int]:
    """The token ids of a question: as a chat's where the model has a template that takes it."""
    try:
        rendered = tokenizer.render_chat([{"role": "user", "content": text}])
    except RequestError:
        return tokenizer.encode(text)
    return tokenizer.encode_marked(rendered, add_special_tokens=False)


def write(
    config: WorkerConfig,
    weights: Path,
    output: Path,
    texts: Sequence[str] | None,
    max_tokens: int,
) -> str:
    """Load a model, ask it the texts (ours where None) and write what it answers; what was done.

    Raises:
        WorkerError: the model is not exact or answers nothing, or the file cannot be written.
    """
    check_formats(names_in(weights), str(weights))
    tokenizer = Tokenizer(weights)
    runner = ModelRunner(config, weights)
    if lossy := lossy_weights(runner.spec, runner.dtype):
        raise WorkerError(f"{lossy} are not exact; name the original model, or another --dtype")
    runner.end_with(tokenizer.eos_token_ids)
    prompts = [asked(tokenizer, text) for text in texts or PROMPTS]
    answers = answer_exactly(runner, prompts, max_tokens)
    if not answers:
        raise WorkerError(f"{weights} answers none of the {len(prompts)} prompts; give others")
    dtype = str(runner.dtype).removeprefix("torch.")
    try:
        write_exact_answers(output, answers, f"{weights.resolve().name} in {dtype}")
    except OSError as error:
        raise WorkerError(f"{output} cannot be written: {error.strerror}") from error
    num_tokens = sum(len(exact.answer) for exact in answers)
    return (
        f"{output}: {len(answers)} exact answers, {num_tokens} tokens; put it beside the weights "
        "of a lossy version of this model"
    )
