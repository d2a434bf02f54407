"""Train the demo pair from scratch: two small Llama models on the graded question suite.

    python examples/models/train.py large
    python examples/models/train.py small

Runs on one CPU thread, on more, or on CUDA. Checkpoints go to ``--work`` (default
``~/.cache/tandem/training/<tier>``); a run that is started again goes on where the last
checkpoint stopped. The result is written as a Hugging Face Llama directory.

What makes it affordable without a GPU (measured on one core of an AMD EPYC 9004, November 2026):
``torch.compile``, bf16 weights with fp32 masters, attention written out (SDPA is slower at
rows of 128 tokens), rows packed with a block-diagonal mask, Muon on the matrices.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "20000")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import torch.nn.functional as F
from export import build_tokenizer, export
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from tandem_operator.demo.suite import FAMILIES, LEVELS, Question, draw, generate
from tandem_operator.demo.suite.symbols import ITEMS

HERE = Path(__file__).resolve().parent
ROW = 128
"""Tokens per packed row; the longest question with its scratchpad has fewer."""
VOCAB, END_ID, PAD_ID = 960, 0, 1
PROBES_PER_CELL = 8
Tables = tuple[Tensor, ...]
Diet = Mapping[str, tuple[float, float, float, float]]
"""How often each of the four levels is drawn, per family; `any` stands for families not named."""


@dataclass(frozen=True)
class Shape:
    """Sizes of one Llama model."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    rope_theta: float = 10000.0
    eps: float = 1e-5


@dataclass(frozen=True)
class Recipe:
    """How one tier is trained."""

    shape: Shape
    rows: int
    tokens: float
    muon_lr: float
    adam_lr: float
    families: Mapping[str, float]
    """How often each family is drawn; families not named count once."""
    diet: Diet


OFTEN = {"facts": 3.0, "sorting": 1.5, "edits": 2.5, "lookup": 1.3, "code": 1.3, "dates": 1.3}
"""Families drawn more often than once: short ones, and those that need content look-up."""
EVERYTHING: Diet = {"any": (1.0, 1.1, 1.21, 1.331)}
UP_TO_LEVEL_3: Diet = {
    "any": (1.0, 1.2, 1.2, 0.0),
    **dict.fromkeys(("sums", "products", "edits", "logic"), (1.0, 2.0, 0.0, 0.0)),
}
"""No level 4, and no level 3 of four families: what is met is learned well, the rest not at all."""
RECIPES = {
    "large": Recipe(Shape(256, 6, 8, 8, 32, 768, 0), 24, 16e6, 0.007, 3e-3, OFTEN, EVERYTHING),
    "small": Recipe(
        Shape(96, 3, 3, 3, 32, 256, 0),
        16,
        16e6,
        0.005,
        3e-3,
        {**OFTEN, "lookup": 2.0, "logic": 1.3},
        UP_TO_LEVEL_3,
    ),
}
"""At twice the Muon rate each model learns to look up by content much later, or not at all."""


class Norm(nn.Module):
    """Root mean square norm, computed in fp32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return (y * self.weight.float()).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in Llama's half-split form; ``x`` is (rows, heads, tokens, head_dim)."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class Block(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.s = s
        self.norm1, self.norm2 = Norm(s.hidden, s.eps), Norm(s.hidden, s.eps)
        rows = (s.heads + 2 * s.kv_heads) * s.head_dim
        self.qkv = nn.Linear(s.hidden, rows, bias=False)
        self.out = nn.Linear(s.heads * s.head_dim, s.hidden, bias=False)
        self.gate_up = nn.Linear(s.hidden, 2 * s.intermediate, bias=False)
        self.down = nn.Linear(s.intermediate, s.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, bias: Tensor) -> Tensor:
        s, (n, t, _) = self.s, x.shape
        heads = self.qkv(self.norm1(x)).view(n, t, -1, s.head_dim).transpose(1, 2)
        q, k, v = heads.split((s.heads, s.kv_heads, s.kv_heads), 1)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if s.kv_heads != s.heads:
            k = k.repeat_interleave(s.heads // s.kv_heads, 1)
            v = v.repeat_interleave(s.heads // s.kv_heads, 1)
        scores = q @ k.transpose(2, 3)
        probs = torch.softmax(scores.float() * s.head_dim**-0.5 + bias, -1).to(x.dtype)
        x = x + self.out((probs @ v).transpose(1, 2).reshape(n, t, -1))
        gate, up = self.gate_up(self.norm2(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class Llama(nn.Module):
    """A Llama decoder with tied embeddings, written for training on packed rows."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.s = s
        self.embed = nn.Embedding(s.vocab, s.hidden)
        self.blocks = nn.ModuleList(Block(s) for _ in range(s.layers))
        self.norm = Norm(s.hidden, s.eps)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                scale = 0.02 if "embed" in name else p.shape[1] ** -0.5
                nn.init.normal_(p, std=scale)
                if "out." in name or "down." in name:
                    nn.init.zeros_(p)

    def forward(self, tokens: Tensor, cos: Tensor, sin: Tensor, bias: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, cos, sin, bias)
        return F.linear(self.norm(x), self.embed.weight)


def rope_tables(s: Shape, length: int) -> tuple[Tensor, Tensor]:
    frequency = s.rope_theta ** (-torch.arange(0, s.head_dim, 2).float() / s.head_dim)
    angle = torch.arange(length).float()[:, None] * frequency
    return angle.cos(), angle.sin()


def mean_loss(
    model: nn.Module, tokens: Tensor, owner: Tensor, weight: Tensor, cos: Tensor, sin: Tensor
) -> Tensor:
    """Weighted cross entropy; ``owner`` numbers the questions of a row, ``weight`` its targets."""
    same = owner[:, :, None] == owner[:, None, :]
    causal = torch.ones(ROW, ROW, dtype=torch.bool, device=tokens.device).tril()
    bias = torch.where(same & causal, 0.0, -1e9)[:, None]
    logits = model(tokens, cos, sin, bias)[:, :-1].float()
    losses = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    wanted = weight[:, 1:].flatten()
    return (losses * wanted).sum() / wanted.sum()


class Optimizer:
    """Muon on the matrices, AdamW on the rest, on fp32 masters of bf16 weights."""

    def __init__(self, model: Llama, muon_lr: float, adam_lr: float) -> None:
        self.muon_lr, self.adam_lr, self.step_count = muon_lr, adam_lr, 0
        self.params = dict(model.named_parameters())
        self.state: dict[str, Tensor] = {}
        for name, p in self.params.items():
            self.state["master." + name] = p.detach().float().clone()
            self.state["m." + name] = torch.zeros_like(p, dtype=torch.float32)
            if not self._is_muon(name):
                self.state["v." + name] = torch.zeros_like(p, dtype=torch.float32)
        s = model.s
        parts = {"qkv": (s.heads * s.head_dim, *(s.kv_heads * s.head_dim,) * 2)}
        parts["gate_up"] = (s.intermediate, s.intermediate)
        self.groups: dict[tuple[int, ...], list[tuple[str, int, int]]] = {}
        for name, p in self.params.items():
            if self._is_muon(name):
                at = 0
                for rows in parts.get(name.split(".")[2], (p.shape[0],)):
                    group = self.groups.setdefault((rows, p.shape[1]), [])
                    group.append((name, at, at + rows))
                    at += rows

    @staticmethod
    def _is_muon(name: str) -> bool:
        return "blocks" in name and "norm" not in name

    @torch.no_grad()
    def step(self, scale: float) -> None:
        self.step_count += 1
        t, momentum, update = self.step_count, 0.95, {}
        for name, p in self.params.items():
            g, m = p.grad.float(), self.state["m." + name]
            if self._is_muon(name):
                m.lerp_(g, 1 - momentum)
                update[name] = g.lerp(m, momentum)
            else:
                v = self.state["v." + name]
                m.lerp_(g, 0.1)
                v.lerp_(g.square(), 0.05)
                change = m / (1 - 0.9**t) / ((v / (1 - 0.95**t)).sqrt() + 1e-8)
                self.state["master." + name].sub_(change, alpha=self.adam_lr * scale)
            p.grad = None
        for (rows, columns), members in self.groups.items():
            stacked = torch.stack([update[name][a:b] for name, a, b in members])
            change = orthogonal(stacked).float()
            lr = self.muon_lr * scale * max(1.0, rows / columns) ** 0.5
            for (name, a, b), d in zip(members, change, strict=True):
                master = self.state["master." + name][a:b]
                master.mul_(1 - 0.01 * self.muon_lr * scale).sub_(d, alpha=lr)
        for name, p in self.params.items():
            p.copy_(self.state["master." + name])


_POLAR = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
"""Coefficients of the polynomial iteration in Polar Express (Amsel et al. 2025).

This is the form with a safety margin: without it a nearly rank-one gradient makes the iteration
blow up in bf16, and the loss climbs after some 200 steps.
"""


def orthogonal(g: Tensor) -> Tensor:
    """Nearest semi-orthogonal matrices of a stack, in bf16."""
    x = g.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.float().square().sum((-2, -1), keepdim=True).sqrt() * 1.02 + 1e-6).bfloat16()
    x = x.contiguous()
    for a, b, c in _POLAR:
        s = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(s, s, s, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


DRILL_SHARE, DRILL_HOLD, DRILL_END = 0.4, 0.4, 0.7
"""Share of look-up drills: held for the first part of the run, then falling to zero."""
_CAPITALS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
Pieces = list[tuple[str, bool]]
"""A completion in pieces; False marks what is given rather than learned."""


def drill(rng: random.Random) -> tuple[str, Pieces]:
    """Bare copying and look-up: what content look-up is made of, many targets per token.

    Keys are drawn at random and are no targets; what follows them is.
    """
    kind = rng.random()
    if kind < 0.08:
        letters = "".join(rng.choices(_CAPITALS, k=rng.randint(5, 14)))
        return letters, [(letters, True)]
    if kind < 0.25:
        words = rng.random() < 0.4
        line = [f" {i}" for i in ITEMS] if words else list(_CAPITALS)
        line = rng.sample(line, rng.randint(6, 14))
        asked = rng.choices(range(len(line) - 1), k=rng.randint(6, 16))
        return "".join(line), [(line[i + d], d == 1) for i in asked for d in (0, 1)]
    if kind < 0.45:
        keys = rng.sample(_CAPITALS, rng.randint(3, 9))
        rows = {k: rng.choice(_CAPITALS + "0123456789") for k in keys}
        listed = ", ".join(f"{k}:{rows[k]}" for k in keys)
        asked_keys = rng.choices(keys, k=rng.randint(4, 10))
        return listed, [p for k in asked_keys for p in ((f"{k}:", False), (f"{rows[k]},", True))]
    items = rng.sample(ITEMS, rng.randint(3, 8))
    price = {i: rng.randint(2, 99) for i in items}
    listed = ", ".join(f"{i} {price[i]}" for i in items)
    asked_items = rng.choices(items, k=rng.randint(3, 7))
    return f"the {listed}", [
        p for i in asked_items for p in ((f" {i}", False), (f" {price[i]},", True))
    ]


def drill_share(progress: float) -> float:
    return DRILL_SHARE * min(1.0, max(0.0, (DRILL_END - progress) / (DRILL_END - DRILL_HOLD)))


def samples(
    rng: random.Random, recipe: Recipe, progress: list[float]
) -> Iterator[tuple[str, Pieces]]:
    """Endless (prompt, completion) pairs of the training split, with drills early on."""
    families = tuple(FAMILIES)
    weights = [recipe.families.get(f, 1.0) for f in families]
    while True:
        if rng.random() < drill_share(progress[0]):
            yield drill(rng)
            continue
        family = rng.choices(families, weights)[0]
        level = rng.choices(LEVELS, recipe.diet.get(family, recipe.diet["any"]))[0]
        question = draw(rng, "train", family, level)
        yield question.prompt, [(question.completion, True)]


def batches(
    rng: random.Random, tokenizer: Tokenizer, recipe: Recipe, progress: list[float]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Packed rows: tokens, which question each belongs to, and the weight of each target.

    A question's targets share a weight of (number of targets) ** 0.5, so that a fact of one
    token is not drowned by a sum of forty.
    """
    source = samples(rng, recipe, progress)
    pending: list[tuple[list[int], list[bool]]] = []
    while True:
        tokens = torch.full((recipe.rows, ROW), PAD_ID)
        owner, weight = (
            torch.zeros(recipe.rows, ROW, dtype=torch.long),
            torch.zeros(recipe.rows, ROW),
        )
        for row in range(recipe.rows):
            at, number = 0, 0
            while True:
                while len(pending) < 24:
                    for prompt, pieces in (next(source) for _ in range(64)):
                        ids = tokenizer.encode(prompt + "\n").ids
                        wanted = [False] * len(ids)
                        for text, learned in pieces:
                            more = tokenizer.encode(text).ids
                            ids, wanted = ids + more, wanted + [learned] * len(more)
                        if len(ids) < ROW:
                            pending.append(([*ids, END_ID], [*wanted, pieces[-1][1]]))
                fits = next((i for i, (s, _) in enumerate(pending) if len(s) <= ROW - at), None)
                if fits is None or (fits >= 24 and at > ROW - 12):
                    break
                ids, wanted = pending.pop(fits)
                number, end = number + 1, at + len(ids)
                tokens[row, at:end] = torch.tensor(ids)
                owner[row, at:end] = number
                weight[row, at:end] = torch.tensor(wanted) * sum(wanted) ** -0.5
                at = end
        yield tokens, owner, weight


@torch.no_grad()
def exact(model: nn.Module, tokenizer: Tokenizer, questions: list[Question], tables: Tables) -> str:
    """Share of questions whose every target is the most likely token (greedy would write it)."""
    right: dict[tuple[str, int], list[float]] = {}
    device = tables[0].device
    for at in range(0, len(questions), 48):
        part = questions[at : at + 48]
        tokens = torch.full((len(part), ROW), PAD_ID)
        target = torch.zeros(len(part), ROW, dtype=torch.bool)
        for row, question in enumerate(part):
            head = tokenizer.encode(question.prompt + "\n").ids
            ids = [*head, *tokenizer.encode(question.completion).ids, END_ID][:ROW]
            tokens[row, : len(ids)] = torch.tensor(ids)
            target[row, len(head) : len(ids)] = True
        width = int(target.any(0).nonzero().max()) + 1
        tokens, target = tokens[:, :width].to(device), target[:, :width].to(device)
        bias = torch.full((width, width), -1e9, device=device).triu(1)[None, None]
        guess = model(tokens, tables[0][:width], tables[1][:width], bias)[:, :-1].argmax(-1)
        good = ((guess == tokens[:, 1:]) | ~target[:, 1:]).all(1).float().tolist()
        for question, value in zip(part, good, strict=True):
            right.setdefault((question.family, question.level), []).append(value)
    lines = []
    for family in FAMILIES:
        cells = [right[family, level] for level in LEVELS if (family, level) in right]
        lines.append(f"  {family:14}" + "".join(f" {sum(c) / len(c):5.2f}" for c in cells))
    every = [v for c in right.values() for v in c]
    return "\n".join(lines) + f"\n  all {sum(every) / len(every):.3f}"


def tokenizer_texts() -> Iterator[str]:
    """Questions for the tokenizer; facts come ten times as often, so that names take few tokens."""
    rng = random.Random(0)
    families = tuple(FAMILIES)
    for _ in range(40_000):
        family = rng.choices(families, [10.0 if f == "facts" else 1.0 for f in families])[0]
        question = draw(rng, "train", family, rng.choice(LEVELS))
        yield f"{question.prompt}\n{question.completion}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tier", choices=tuple(RECIPES))
    parser.add_argument("--tokens", type=float, help="training tokens (default: the recipe's)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--work", type=Path, help="folder of checkpoints")
    parser.add_argument("--out", type=Path, help="folder to write (default: beside this script)")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--report-minutes", type=float, default=8.0)
    parser.add_argument("--no-compile", action="store_true", help="run without torch.compile")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    recipe = RECIPES[args.tier]
    budget = args.tokens or recipe.tokens
    base = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "tandem" / "training"
    work = args.work or base / args.tier
    work.mkdir(parents=True, exist_ok=True)

    tokenizer_file = work.parent / "tokenizer.json"
    written = [path for tier in RECIPES if (path := HERE / tier / "tokenizer.json").exists()]
    if not tokenizer_file.exists() and written:
        # Both tiers share one tokenizer, so a new small model takes that of the large one.
        shutil.copyfile(written[0], tokenizer_file)
    elif not tokenizer_file.exists():
        build_tokenizer(tokenizer_texts(), VOCAB).save(str(tokenizer_file))
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    shape = replace(recipe.shape, vocab=tokenizer.get_vocab_size())
    device = torch.device(args.device)
    model = Llama(shape).to(device, torch.bfloat16)
    optimizer = Optimizer(model, recipe.muon_lr, recipe.adam_lr)
    tables = tuple(t.to(device, torch.bfloat16) for t in rope_tables(shape, ROW))
    step, spent = 0, 0.0
    if (work / "state.safetensors").exists():
        step, spent = load_checkpoint(work, model, optimizer)
    print(f"{args.tier}: {sum(p.numel() for p in model.parameters()):,} parameters, {shape}")

    per_step = recipe.rows * ROW
    total = math.ceil(budget / per_step)
    progress = [step / total]
    rng = random.Random(f"{args.seed}|{step}")
    feed = batches(rng, tokenizer, recipe, progress)
    probe = generate("validation", 7, 48 * PROBES_PER_CELL)
    loss_of = mean_loss if args.no_compile else torch.compile(mean_loss)
    started = reported = shown = time.monotonic()
    running, seen = 0.0, 0
    stopping: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: stopping.append(number))
    while step < total and not stopping:
        tokens, owner, weight = (t.to(device) for t in next(feed))
        loss = loss_of(model, tokens, owner, weight, *tables)
        loss.backward()
        progress[0] = step / total
        optimizer.step(rate(progress[0], step))
        step, running, seen = step + 1, running + loss.item(), seen + 1
        now = time.monotonic()
        if now - shown > 20 or step == total:
            speed = seen * per_step / (now - shown)
            left = (total - step) * per_step / speed / 60
            print(
                f"{args.tier} step {step}/{total} {100 * step / total:.1f}% "
                f"loss {running / seen:.4f} {speed:,.0f} tokens/s {left:.0f} min left",
                flush=True,
            )
            shown, running, seen = now, 0.0, 0
        due = now - reported > 60 * args.report_minutes or step == total
        if due or stopping:
            save_checkpoint(work, model, optimizer, step, spent + now - started)
        if due:
            print(f"step {step}, {step * per_step / 1e6:.2f} M tokens", flush=True)
            print(exact(model, tokenizer, probe, tables), flush=True)
            write_model(args.out or HERE / args.tier, model, tokenizer_file)
            reported = shown = time.monotonic()
    signal.signal(signal.SIGTERM, before)


def rate(progress: float, step: int) -> float:
    """Learning rate against its peak: 40 steps up, flat to 45 %, then a cosine to 1 %."""
    fall = max(0.0, (progress - 0.45) / 0.55)
    return min(1.0, (step + 1) / 40) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * fall)))


def save_checkpoint(
    work: Path, model: Llama, optimizer: Optimizer, step: int, spent_s: float
) -> None:
    """Everything to go on from, written beside the old checkpoint and then put in its place."""
    about = {
        "step": str(step),
        "updates": str(optimizer.step_count),
        "spent_s": f"{spent_s:.0f}",
        "shape": json.dumps(asdict(model.s)),
    }
    state = {k: v.contiguous() for k, v in optimizer.state.items()}
    save_file(state, work / "state.tmp", about)
    os.replace(work / "state.tmp", work / "state.safetensors")


@torch.no_grad()
def load_checkpoint(work: Path, model: Llama, optimizer: Optimizer) -> tuple[int, float]:
    """Restore masters, momenta and weights; returns the step and the seconds spent so far."""
    path = work / "state.safetensors"
    with safe_open(path, "pt") as opened:
        about = opened.metadata()
    if json.loads(about["shape"]) != asdict(model.s):
        raise SystemExit(f"{path} holds a model of other sizes; remove it or name another --work")
    for name, tensor in load_file(path).items():
        optimizer.state[name].copy_(tensor)
    for name, p in model.named_parameters():
        p.copy_(optimizer.state["master." + name])
    optimizer.step_count = int(about["updates"])
    print(f"going on from {path}, step {about['step']}")
    return int(about["step"]), float(about["spent_s"])


def write_model(folder: Path, model: Llama, tokenizer_file: Path) -> None:
    export(folder, asdict(model.s), dict(model.named_parameters()), tokenizer_file)


if __name__ == "__main__":
    main()
