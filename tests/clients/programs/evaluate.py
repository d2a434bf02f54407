"""lm-eval (multiple choice by token ids, and generation) and guidellm, without a network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

URL, FOUND = sys.argv[1], {}
HOME = Path(tempfile.mkdtemp())
TOOLS = Path(sys.executable).parent
CHOICE = """
task: choose
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: ["a", "b"]
doc_to_target: 0
metric_list: [{metric: acc}]
"""
GENERATE = """
task: say
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "42"
generation_kwargs: {until: ["\\n"], max_gen_toks: 8}
metric_list: [{metric: exact_match}]
"""


def save_tokenizer() -> Path:
    """One token for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(["<end>", *alphabet])}
    model = Tokenizer(models.BPE(vocabulary, []))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<end>", pad_token="<end>")
    fast.save_pretrained(HOME / "tokenizer")
    return HOME / "tokenizer"


def evaluate(tokenizer: Path) -> None:
    data = HOME / "data.jsonl"
    data.write_text("".join(json.dumps({"question": f"{n} + 1?"}) + "\n" for n in range(3)))
    for name, text in (("choose", CHOICE), ("say", GENERATE)):
        (HOME / f"{name}.yaml").write_text(text.replace("DATA", str(data)))
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    options = f"model=large,base_url={URL}/v1/completions,tokenizer={tokenizer}"
    found = simple_evaluate(
        model="local-completions",
        model_args=f"{options},tokenized_requests=True,max_length=512,num_concurrent=1",
        tasks=["choose", "say"],
        task_manager=TaskManager(include_path=str(HOME), include_defaults=False),
        bootstrap_iters=0,
    )
    FOUND["choose"] = found["results"]["choose"]["acc,none"]
    FOUND["say"] = [each["resps"][0][0] for each in found["samples"]["say"]]


def measure(tokenizer: Path) -> None:
    report = HOME / "report.json"
    command = [
        str(TOOLS / "guidellm"),
        "run",
        "--disable-console",
        f"--backend=kind=openai_http,target={URL},model=chat",
        "--profile=kind=synchronous",
        "--constraint=kind=max_requests,count=3",
        f"--tokenizer=kind=hf_auto,model={tokenizer}",
        "--data=kind=synthetic_text,prompt_tokens=16,output_tokens=4",
        f"--output=kind=json,path={report}",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(done.stdout + done.stderr)
    (run,) = json.loads(report.read_text())["benchmarks"]
    FOUND["guidellm"] = {name: len(each) for name, each in run["requests"].items() if each}


place = save_tokenizer()
for step in sys.argv[2:] or ("evaluate", "measure"):
    {"evaluate": evaluate, "measure": measure}[step](place)
print(json.dumps(FOUND))
