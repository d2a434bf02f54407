"""Traces are read in the forms in which they are published; what cannot be read says why."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from tandem_operator.cli.traffic import scores_of
from tandem_operator.demo.suite import generate as generate_questions
from tandem_operator.simulate.arrivals import (
    Arrival,
    TraceError,
    generate,
    read_outcomes,
    read_trace,
    with_outcomes,
)
from tandem_router.predictor import load
from tandem_router.routing.scorer import with_gains

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "traces"
needs_data = pytest.mark.skipif(
    not DATA.is_dir(),
    reason=f"{DATA} is not on this machine: public traces are read where the data stands beside "
    "the checkout, here only lines in their forms",
)


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


@needs_data
@pytest.mark.parametrize(
    ("name", "count", "prompt", "output"),
    [
        ("azure2023/AzureLLMInferenceTrace_conv.csv", 19_366, 374, 44),
        ("servegen/r1_18h_5rps_1h_seed0.csv", 17_951, 234, 474),
        ("mooncake/conversation_trace.jsonl", 12_031, 6_758, 500),
    ],
)
def test_public_traces_are_read_whole(name: str, count: int, prompt: int, output: int) -> None:
    arrivals = list(read_trace(DATA / name))

    assert len(arrivals) == count
    assert (arrivals[0].prompt_tokens, arrivals[0].output_of("any")) == (prompt, output)
    assert arrivals[0].at_s == 0.0


def test_own_lines_may_give_lengths_per_tier_and_qualities(tmp_path: Path) -> None:
    row = {
        "at_s": 3.5,
        "prompt_tokens": 100,
        "output_tokens": {"small": 10, "large": 30},
        "quality": {"small": 0.0, "large": 1.0},
        "tier": "large",
    }

    (arrival,) = read_trace(written(tmp_path, "t.jsonl", json.dumps(row) + "\n"))

    assert (arrival.output_of("large"), arrival.output_of("small")) == (30, 10)
    assert arrival.tier == "large"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is empty"),
        ("a,b\n1,2\n", "has the columns a, b; wanted"),
        ("timestamp_s,input_tokens,output_tokens\n1,x,2\n", ":2:"),
        ("timestamp_s,input_tokens,output_tokens\n2,1,2\n1,1,2\n", ":3: times go back"),
        ('{"at_s": 1, "prompt_tokens": 2}\n', ":1: 'output_tokens' is missing"),
        ('{"at_s": 1, "prompt_tokens": 2, "output_tokens": 3, "qualty": {}}', "unknown field"),
        ("{not json\n", ":1:"),
        ('{"a":' * 20_000, ":1: maximum recursion depth"),
        ("at_s,prompt_tokens,output_tokens\n0,1,inf\n", ":2: inf is no number to count with"),
        ("at_s,prompt_tokens,output_tokens\nnan,1,2\n", ":2: nan is no number to count with"),
        ('{"at_s": 0, "prompt_tokens": 1e300, "output_tokens": 1}', "tokens are more than"),
        ('{"at_s": 0, "prompt_tokens": 1, "output_tokens": 1, "predicted": 3}', "by tier"),
        ('{"at_s": 0, "prompt_tokens": 1, "output_tokens": 1, "tier": []}', "a tier's name"),
    ],
)
def test_a_trace_that_cannot_be_read_says_where_and_why(
    tmp_path: Path, text: str, says: str
) -> None:
    with pytest.raises(TraceError, match=says):
        list(read_trace(written(tmp_path, "trace", text)))


def test_generated_gaps_have_the_rate_asked_for_and_come_in_bursts_when_asked() -> None:
    steady = [a.at_s for a in generate(10.0, 2000.0, 1)]
    bursts = [a.at_s for a in generate(10.0, 2000.0, 1, shape=0.2)]

    def spread(times: list[float]) -> float:
        gaps = [b - a for a, b in zip(times, times[1:], strict=False)]
        mean = sum(gaps) / len(gaps)
        return sum((g - mean) ** 2 for g in gaps) / len(gaps) / mean**2

    assert len(steady) == pytest.approx(20_000, rel=0.03)
    assert spread(steady) == pytest.approx(1.0, rel=0.1)
    assert spread(bursts) == pytest.approx(5.0, rel=0.2)


@pytest.mark.parametrize(
    "data",
    [
        gzip.compress(b'{"quality": {}}', mtime=0)[:-9],
        gzip.compress(b'{"a":' * 20_000, mtime=0),
        b"\x1f\x8bx",
        b"\xff",
    ],
)
def test_outcomes_that_cannot_be_read_say_so(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "graded.jsonl.gz"
    path.write_bytes(data)

    with pytest.raises(TraceError, match="rows look like those of `tandem train`"):
        read_outcomes(path)


def test_requests_of_one_conversation_draw_one_outcome(tmp_path: Path) -> None:
    path = tmp_path / "graded.jsonl.gz"
    with gzip.open(path, "wt") as f:
        for index in range(50):
            f.write(json.dumps({"prompt": "p", "quality": {"small": index / 50.0}}) + "\n")
    turns = [Arrival(float(i), 10, {"": 1}, (0, i % 3, i)) for i in range(30)]

    drawn = list(with_outcomes(iter(turns), read_outcomes(path), seed=1))

    by_root = {(a.prefix[1], a.quality["small"]) for a in drawn if a.quality}
    assert len(by_root) == 3


def test_an_artifact_scores_outcomes_as_its_router_would(tmp_path: Path) -> None:
    """By its gains, with the lengths that price the choice."""
    predictor = load(ROOT / "examples" / "01-hybrid" / "predictor")
    prompts = [question.prompt for question in generate_questions("test", 3, 30)]
    rows = [{"prompt": p, "quality": {"small": 1, "large": 1}} for p in prompts]
    path = tmp_path / "outcomes.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    found = read_outcomes(path, scores_of(predictor))

    for prompt, row in zip(prompts, found, strict=True):
        said = predictor.score(prompt)
        live = with_gains(said)
        assert live is not None
        assert row.predicted == live.quality
        assert row.predicted_tokens == said.mean_tokens
    assert any(
        row.predicted != predictor.score(p).quality for p, row in zip(prompts, found, strict=True)
    )
    (drawn,) = with_outcomes(iter([Arrival(0.0, 9, {"": 5})]), found[:1], seed=1)
    assert drawn.predicted_tokens == found[0].predicted_tokens
