"""A worker on a GPU compiles every kernel variant before its first request."""

import importlib.util
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="variants are Triton's")

from tandem_kernels import dispatch, warm_up
from tandem_kernels.checks import KernelArgumentError
from tandem_worker.config import WorkerConfig
from tandem_worker.engine import runner as runner_module
from tandem_worker.engine.requests import EngineRequest, Work
from tandem_worker.engine.runner import ModelRunner
from tandem_worker.engine.sampling import SamplingParams
from tandem_worker.errors import ConfigError
from tandem_worker.scheduling.sequence import Chunk
from tandem_worker.scheduling.sequence import Sequence as ScheduledSequence

_path = Path(__file__).parents[1] / "kernels" / "compiled" / "compile_target.py"
_spec = importlib.util.spec_from_file_location("compile_target", _path)
compile_target = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(compile_target)

SAMPLINGS = (
    SamplingParams(temperature=0.0),
    SamplingParams(),
    SamplingParams(top_k=5),
    SamplingParams(top_p=0.9, num_logprobs=0),
    SamplingParams(min_p=0.1, num_logprobs=3),
    SamplingParams(presence_penalty=0.5),
    SamplingParams(repetition_penalty=1.2, frequency_penalty=0.1, top_k=3, num_logprobs=1),
    SamplingParams(logit_bias=((3, 1.0),)),
    SamplingParams(logit_bias=((3, 1.0),), top_p=0.5, frequency_penalty=0.3),
    SamplingParams(temperature=0.0, min_tokens=4, num_logprobs=2),
)
# Steps as (decodes' context lengths, prefill chunks as (cached, new)).
STEPS = (
    ((), ((0, 1),)),
    ((), ((0, 70), (64, 3))),
    ((1,), ()),
    ((65, 3, 130), ()),
    ((2, 64), ((0, 5),)),
    (tuple(range(1, 34)), ((7, 60), (0, 1), (0, 129))),
)


@pytest.fixture
def variants(monkeypatch):
    """Launches become entries of a set that tells compiled variants apart; nothing is computed."""
    from triton.runtime.jit import JITFunction

    found = set()

    def record(self, *args, grid, warmup, **kwargs):
        names = [parameter.name for parameter in self.params]
        options = tuple(sorted((k, v) for k, v in kwargs.items() if k not in names))
        bound = dict(zip(names, args, strict=False))
        bound |= {key: value for key, value in kwargs.items() if key in names}
        described = compile_target.describe(self, bound)
        found.add((self.__module__, self.__name__, *map(str, described), options))

    monkeypatch.setattr(JITFunction, "run", record)
    monkeypatch.setattr(dispatch, "interpreting", lambda: True)
    monkeypatch.setattr(dispatch, "device_facts", lambda tensor: ("sm_90", 132))
    return found


def step(runner, decodes, chunks, sampling):
    """One step of the engine with these lengths; token ids and blocks are arbitrary."""
    work = []
    for start, count in [(length - 1, 1) for length in decodes] + list(chunks):
        end = start + count
        blocks = list(range(-(-end // 64)))
        sequence = ScheduledSequence("r", [2] * end, end, block_ids=blocks)
        request = EngineRequest(sequence, sampling, lambda event: None)
        work.append(Work(Chunk(sequence, start, count), request))
    runner.execute(work, len(decodes))


MODELS = {
    "qwen3": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 40},
    "mixtral": {"num_local_experts": 5, "num_experts_per_tok": 2},
}


@pytest.mark.parametrize(
    ("family", "kv"),
    [("qwen3", "auto"), ("mistral", "auto"), ("mixtral", "auto"), ("qwen3", "int8"),
     ("mistral", "fp8")],
)  # fmt: skip
def test_a_running_engine_launches_only_what_warm_up_compiled(
    family, kv, build_model, tmp_path, variants
):
    directory = build_model(tmp_path / family, family, **MODELS[family])
    config = WorkerConfig(
        served_model="tiny", device="cpu", dtype="bfloat16", num_kv_blocks=16, kv_cache_dtype=kv
    )
    runner = ModelRunner(config, directory)

    warm_up(runner.kernel_shapes())
    compiled = set(variants)
    variants.clear()
    for sampling in SAMPLINGS:
        for decodes, chunks in STEPS:
            step(runner, decodes, chunks, sampling)

    assert len(variants) > 10
    assert (family == "mixtral") == any("grouped_gemm" in name for name, *_ in variants)
    assert variants - compiled == set()


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantized_model_launches_only_what_warm_up_compiled(
    bits, tiny_llama, tmp_path, variants
):
    path = Path(__file__).parents[2] / "examples" / "models" / "quantize.py"
    spec = importlib.util.spec_from_file_location("quantize", path)
    quantize = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(quantize)
    quantize.write(tiny_llama, tmp_path / "quantized", bits)
    config = WorkerConfig(served_model="tiny", device="cpu", dtype="bfloat16", num_kv_blocks=16)
    runner = ModelRunner(config, tmp_path / "quantized")

    warm_up(runner.kernel_shapes())
    compiled = set(variants)
    variants.clear()
    for decodes, chunks in STEPS:
        step(runner, decodes, chunks, SamplingParams(temperature=0.0))

    assert any("skinny_gemm" in name for name, *_ in variants)
    assert variants - compiled == set()


def test_warm_up_compiles_on_a_gpu_and_not_on_a_cpu(tiny_llama, monkeypatch):
    config = WorkerConfig(served_model="tiny", num_kv_blocks=16, device="cpu")
    runner = ModelRunner(config, tiny_llama)
    compiled = []
    monkeypatch.setattr(runner_module, "warm_up", compiled.append)

    runner.warm_up()
    assert compiled == []

    runner.execute = lambda *args: []
    runner.device = torch.device("cuda")
    runner.warm_up()

    assert [(shapes.device, shapes.head_dim) for shapes in compiled] == [("cuda", 16)]


def test_a_format_that_the_gpu_lacks_is_a_sentence_at_the_start(tiny_llama, monkeypatch):
    config = WorkerConfig(served_model="tiny", num_kv_blocks=16, device="cpu")
    runner = ModelRunner(config, tiny_llama)

    def refuse(shapes):
        raise KernelArgumentError("float8_e4m3fn needs compute capability 8.9")

    monkeypatch.setattr(runner_module, "warm_up", refuse)
    runner.device = torch.device("cuda")

    with pytest.raises(ConfigError, match=r"cannot run this model on cuda: float8.*another format"):
        runner.warm_up()
