"""The training script: packs, resumes, and writes what transformers reads as the same model."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
import train as script
import transformers
from export import build_tokenizer, export

SCRIPTS = Path(script.__file__).parent


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    questions = script.generate("train", 0, 2_000)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    build_tokenizer((f"{q.prompt}\n{q.completion}" for q in questions), 600).save(str(path))
    return path


@pytest.fixture
def shape(tokenizer_file: Path) -> script.Shape:
    vocab = script.Tokenizer.from_file(str(tokenizer_file)).get_vocab_size()
    return script.Shape(64, 2, 4, 2, 32, 96, vocab)


def test_the_exported_directory_gives_the_same_logits_in_transformers(
    tmp_path: Path, tokenizer_file: Path, shape: script.Shape
) -> None:
    torch.manual_seed(0)
    model = script.Llama(shape)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    export(
        tmp_path / "model",
        script.asdict(shape),
        dict(model.named_parameters()),
        tokenizer_file,
    )
    tokens = torch.randint(2, shape.vocab, (2, 50))
    cos, sin = script.rope_tables(shape, 50)
    causal = torch.full((50, 50), -1e9).triu(1)

    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)

    with torch.no_grad():
        ours = model(tokens, cos, sin, causal)
        assert (theirs(tokens).logits - ours).abs().max() < 1e-4 * ours.abs().max()


def test_a_chat_turn_becomes_the_form_of_training(
    tmp_path: Path, tokenizer_file: Path, shape: script.Shape
) -> None:
    weights = dict(script.Llama(shape).named_parameters())
    export(tmp_path / "model", script.asdict(shape), weights, tokenizer_file)

    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    chat = [{"role": "user", "content": " What is 2+2? "}]

    assert tokenizer.apply_chat_template(chat, tokenize=False) == "What is 2+2?\n"
    assert tokenizer.convert_ids_to_tokens(tokenizer("307 KQ").input_ids) == [*"307", "Ġ", *"KQ"]
    assert tokenizer.decode(tokenizer("any text: é, ☃").input_ids) == "any text: é, ☃"
    assert tokenizer.eos_token_id == script.END_ID
    assert tokenizer.pad_token_id == script.PAD_ID


def test_packed_rows_keep_questions_apart_and_learn_only_from_answers(
    tokenizer_file: Path,
) -> None:
    tokenizer = script.Tokenizer.from_file(str(tokenizer_file))
    feed = script.batches(random.Random(2), tokenizer, script.RECIPES["small"], [1.0])

    tokens, owner, weight = next(feed)

    assert tokens.shape == owner.shape == weight.shape == (16, script.ROW)
    assert (weight[owner == 0] == 0).all()
    for row in range(16):
        for number in range(1, int(owner[row].max()) + 1):
            here = owner[row] == number
            text = tokenizer.decode(tokens[row][here].tolist())
            learned = tokenizer.decode(tokens[row][here & (weight[row] > 0)].tolist())
            assert text.split("\n", 1)[1] == learned
            assert ">" in learned


def test_neighbours_in_a_row_do_not_change_an_answer(shape: script.Shape) -> None:
    torch.manual_seed(1)
    model = script.Llama(shape)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    tables = script.rope_tables(shape, script.ROW)
    tokens = torch.randint(2, shape.vocab, (1, script.ROW))
    owner = torch.ones(1, script.ROW, dtype=torch.long)
    owner[:, 60:] = 2
    weight = (owner == 2).float()
    weight[:, 60] = 0
    other = tokens.clone()
    other[:, :60] = torch.randint(2, shape.vocab, (1, 60))

    losses = [script.mean_loss(model, t, owner, weight, *tables).item() for t in (tokens, other)]

    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_stopped_run_goes_on_from_its_checkpoint(
    tmp_path: Path,
    tokenizer_file: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(script, "PROBES_PER_CELL", 1)
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_file.read_bytes())
    per_step = script.RECIPES["small"].rows * script.ROW
    where = ["--work", str(tmp_path / "small"), "--out", str(tmp_path / "out")]
    fixed = ["small", "--no-compile", "--threads", "1", "--device", "cpu", *where]

    script.main([*fixed, "--tokens", str(2 * per_step)])
    script.main([*fixed, "--tokens", str(3 * per_step)])

    said = capsys.readouterr().out
    assert "step 2/2" in said
    assert "going on from" in said
    assert "step 3/3" in said
    assert "step 1/3" not in said
    transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")


def test_a_tier_trained_anew_shares_the_tokenizer_of_the_committed_pair(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "PROBES_PER_CELL", 1)
    where = ["--work", str(tmp_path / "work" / "small"), "--out", str(tmp_path / "out")]

    script.main(
        ["small", "--no-compile", "--threads", "1", "--device", "cpu", "--tokens", "1", *where]
    )

    written = (tmp_path / "out" / "tokenizer.json").read_bytes()
    assert written == (SCRIPTS / "large" / "tokenizer.json").read_bytes()
    assert written == (SCRIPTS / "small" / "tokenizer.json").read_bytes()


def test_the_small_model_is_never_taught_what_its_diet_leaves_out() -> None:
    source = script.samples(random.Random(5), script.RECIPES["small"], [1.0])

    prompts = [prompt for prompt, _ in (next(source) for _ in range(2_000))]

    assert any("village of" in prompt for prompt in prompts)
    assert not any("hamlet of" in prompt for prompt in prompts)
    assert any("two steps" in prompt for prompt in prompts)
    assert not any("three steps" in prompt or "four steps" in prompt for prompt in prompts)


def test_the_orthogonal_step_neither_explodes_nor_vanishes_on_nearly_rank_one_gradients() -> None:
    torch.manual_seed(3)
    for rows, columns in ((64, 64), (192, 64), (64, 192)):
        gradient = torch.randn(3, rows, 1) @ torch.randn(3, 1, columns)
        gradient += 0.01 * torch.randn(3, rows, columns)

        values = torch.linalg.svdvals(script.orthogonal(gradient).float())

        assert values.max() < 1.3
        assert values[:, 0].min() > 0.7
