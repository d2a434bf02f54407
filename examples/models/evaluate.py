"""Measure the pair: the family by level table, and outcomes for the router's predictor.

    python examples/models/evaluate.py                        # test split, prints the table
    python examples/models/evaluate.py --write-card           # ... and puts it into README.md
    python examples/models/evaluate.py --outcomes 7200        # validation -> outcomes.jsonl.gz

Answers are greedy, in float32, through transformers, so that they are what any server of these
directories should say.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import sys
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from tandem_operator.demo.suite import FAMILIES, LEVELS, MARKER, Question, check, generate

HERE = Path(__file__).resolve().parent
TIERS = ("small", "large")
MAX_NEW_TOKENS = 80
"""The longest reference completion has fewer."""
BEGIN, FINISH = "<!-- table: begin -->", "<!-- table: end -->"


@torch.inference_mode()
def answers(
    folder: Path, questions: list[Question], batch: int, device: str
) -> list[tuple[str, int]]:
    """Greedy completion and its number of tokens (end token included) for each question."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": q.prompt}], tokenize=False)
        for q in questions
    ]
    encoded = [tokenizer(p, add_special_tokens=False)["input_ids"] for p in prompts]
    # Questions of similar work end together, so that few steps run for few rows.
    order = sorted(
        range(len(questions)), key=lambda i: (len(questions[i].completion), len(encoded[i]))
    )
    found: list[tuple[str, int]] = [("", 0)] * len(questions)
    started = shown = time.monotonic()
    for at in range(0, len(order), batch):
        part = order[at : at + batch]
        width = max(len(encoded[i]) for i in part)
        pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
        ids = torch.tensor([[pad] * (width - len(encoded[i])) + encoded[i] for i in part])
        mask = torch.tensor([[0] * (width - len(encoded[i])) + [1] * len(encoded[i]) for i in part])
        written = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
            eos_token_id=end,
            pad_token_id=pad,
        )[:, width:].tolist()
        for i, row in zip(part, written, strict=True):
            stop = row.index(end) if end in row else len(row)
            found[i] = (tokenizer.decode(row[:stop]), min(stop + 1, len(row)))
        now = time.monotonic()
        if now - shown > 2 or at + batch >= len(order):
            done = min(at + batch, len(order))
            left = (now - started) / done * (len(order) - done)
            print(f"{folder.name}: {done}/{len(order)} questions, {left:.0f} s left", flush=True)
            shown = now
    return found


def table(questions: list[Question], right: dict[str, list[bool]]) -> str:
    """Markdown: one row per family, the levels of both models side by side."""
    head = "| family | " + " | ".join(f"{t} {level}" for t in right for level in LEVELS) + " |"
    lines = [head, "|" + "---|" * (1 + len(right) * len(LEVELS))]

    def cell(tier: str, family: str | None, level: int) -> str:
        values = [
            ok
            for q, ok in zip(questions, right[tier], strict=True)
            if q.level == level and family in (None, q.family)
        ]
        return f"{sum(values) / len(values):.2f}" if values else "-"

    for family in (*FAMILIES, None):
        cells = (cell(t, family, level) for t in right for level in LEVELS)
        lines.append(f"| {family or '**all**'} | " + " | ".join(cells) + " |")
    means = ", ".join(f"{t} {sum(v) / len(v):.3f}" for t, v in right.items())
    lines.append(f"\nOver all {len(questions):,} questions: {means}.")
    return "\n".join(lines)


def write_card(text: str) -> None:
    card = HERE / "README.md"
    old = card.read_text()
    if BEGIN not in old or FINISH not in old:
        raise SystemExit(f"{card} lacks the lines {BEGIN} and {FINISH}; put them back")
    before, after = old.split(BEGIN)[0], old.split(FINISH)[1]
    card.write_text(f"{before}{BEGIN}\n{text}\n{FINISH}{after}")


def write_outcomes(
    path: Path, questions: list[Question], found: dict[str, list[tuple[str, int]]]
) -> None:
    """Rows of the routing data format, one per question, quality 1 for right and 0 for wrong."""
    lines = []
    for i, q in enumerate(questions):
        row = {
            "prompt": q.prompt,
            "quality": {t: float(check(q, found[t][i][0])) for t in found},
            "output_tokens": {t: found[t][i][1] for t in found},
            "group": q.id,
            "task": q.family,
        }
        lines.append(json.dumps(row, ensure_ascii=False))
    with path.open("wb") as raw, gzip.GzipFile("", "wb", 9, raw, mtime=0) as packed:
        packed.write(("\n".join(lines) + "\n").encode())


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, default=HERE, help="folder with small/ and large/")
    parser.add_argument("--tiers", nargs="+", default=list(TIERS), choices=TIERS)
    parser.add_argument("--questions", type=int, default=2400, help="test questions to ask")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--write-card", action="store_true", help="put the table into README.md")
    parser.add_argument("--outcomes", type=int, metavar="N", help="measure N validation questions")
    parser.add_argument("--outcomes-file", type=Path, default=HERE / "outcomes.jsonl.gz")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    missing = [str(args.models / t) for t in args.tiers if not (args.models / t).is_dir()]
    if missing:
        sys.exit(f"no model in {', '.join(missing)}; train it with examples/models/train.py")
    split = "validation" if args.outcomes else "test"
    questions = generate(split, args.seed, args.outcomes or args.questions)
    found = {t: answers(args.models / t, questions, args.batch, args.device) for t in args.tiers}
    right = {
        t: [check(q, text) for q, (text, _) in zip(questions, rows, strict=True)]
        for t, rows in found.items()
    }
    text = table(questions, right)
    print(text)
    unfinished = {t: sum(MARKER not in text for text, _ in rows) for t, rows in found.items()}
    print("answers without a marker: " + ", ".join(f"{t} {n}" for t, n in unfinished.items()))
    if args.outcomes:
        write_outcomes(args.outcomes_file, questions, found)
        print(f"wrote {args.outcomes_file}")
    elif args.write_card:
        write_card(text)


if __name__ == "__main__":
    main()
