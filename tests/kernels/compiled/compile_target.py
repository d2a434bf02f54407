"""Compile every kernel variant for one GPU target without a GPU, and report what it takes.

    python compile_target.py sm_90            print one target's resources as JSON
    python compile_target.py --write          recompile all targets, rewrite resources.json and the
                                              table in docs/kernels.md

The variants come from the launchers themselves: each operation is called on CPU tensors while the
launch is replaced by a recorder, so the compiled code has exactly the constants, dtypes and
divisibility attributes that a launch on the target would pass. Every target needs a process of its
own, because the launchers' tables and Triton's backends are chosen per process.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).parent
TABLE = FOLDER / "resources.json"
# The computed bound on an H200 stands in the documentation, after this line.
DOCUMENT = FOLDER.parents[2] / "docs" / "kernels.md"
MARK = "<!-- written by tests/kernels/compiled/compile_target.py --write -->\n"
# Target: (Triton's backend, its architecture, warp size, processors of the device meant).
TARGETS = {
    "sm_80": ("cuda", 80, 32, 108),
    "sm_90": ("cuda", 90, 32, 132),
    "sm_100": ("cuda", 100, 32, 148),
    "gfx942": ("hip", "gfx942", 64, 304),
}


def record_launches(target):
    """Yield (variant name, kernel, bound arguments, options) for the calls in `calls`."""
    from triton.runtime.jit import JITFunction

    from tandem_kernels import dispatch

    facts = (target, TARGETS[target][3])
    dispatch.interpreting = lambda: True
    dispatch.device_facts = lambda tensor: facts
    launches = []

    def record(self, *args, grid, warmup, **kwargs):
        del grid, warmup
        names = [parameter.name for parameter in self.params]
        bound = dict(zip(names, args, strict=False))
        options = {key: value for key, value in kwargs.items() if key not in names}
        bound |= {key: value for key, value in kwargs.items() if key in names}
        launches.append((self, bound, options))

    JITFunction.run = record
    for name, call in calls(target):
        launches.clear()
        call()
        for kernel, bound, options in launches:
            yield f"{name} | {kernel.__name__.strip('_')}", kernel, bound, options


def calls(target):
    """The public operations at the shapes of a 7B and a 0.5B model, by variant name."""
    import torch

    from tandem_kernels import kv_blocks, quest, snapkv, squeezed
    from tandem_kernels.grouped_gemm import grouped_gemm
    from tandem_kernels.int8_kv import SCALE_BYTES, codes_and_scales
    from tandem_kernels.paged_decode import paged_decode_attention
    from tandem_kernels.prefill import prefill_attention
    from tandem_kernels.qk_norm_rope import qk_norm_rope_write
    from tandem_kernels.quantize import quantize_fp8, quantize_int4, quantize_int8
    from tandem_kernels.rms_norm import add_rms_norm
    from tandem_kernels.sampler import sample
    from tandem_kernels.skinny_gemm import skinny_gemm
    from tandem_kernels.swiglu import swiglu

    bf16, f32 = torch.bfloat16, torch.float32
    fp8 = torch.float8_e5m2 if target == "sm_80" else torch.float8_e4m3fn

    def zeros(*shape, dtype=bf16):
        return torch.zeros(shape, dtype=dtype)

    def cache(kv_heads, head_dim, dtype=bf16):
        beside = SCALE_BYTES if dtype == torch.int8 else 0
        return zeros(2, kv_heads, 64, head_dim + beside, dtype=dtype)

    tables, lens = zeros(4, 16, dtype=torch.int32), zeros(4, dtype=torch.int32) + 64
    starts = torch.arange(0, 20, 4, dtype=torch.int32)

    def scales_of(kv, kv_heads):
        if kv.dtype == torch.int8:
            kv, scales = codes_and_scales(kv)
            return kv, {"k_scale": scales, "v_scale": scales}
        if kv.dtype in (bf16, torch.float16):
            return kv, {}
        return kv, {"k_scale": torch.ones(kv_heads), "v_scale": torch.ones(kv_heads)}

    def decode(heads, kv_heads, head_dim, rows=1, kv_dtype=bf16, dtype=bf16, **options):
        kv, scales = scales_of(cache(kv_heads, head_dim, kv_dtype), kv_heads)
        q = zeros(4, rows, heads, head_dim, dtype=dtype)
        paged_decode_attention(q, kv, kv, tables, lens, scale=0.1, **scales, **options)

    def prefill(heads, kv_heads, head_dim, kv_dtype=bf16, **options):
        kv, scales = scales_of(cache(kv_heads, head_dim, kv_dtype), kv_heads)
        q = zeros(16, heads, head_dim)
        prefill_attention(q, kv, kv, tables, starts, lens, scale=0.1, **scales, **options)

    def rope(heads, kv_heads, head_dim, kv_dtype=bf16, norm=False, bounds=False):
        kv, options = scales_of(cache(kv_heads, head_dim, kv_dtype), kv_heads)
        fused = zeros(16, heads + 2 * kv_heads, head_dim)
        q, k, v = fused.split([heads, kv_heads, kv_heads], dim=1)
        if norm:
            options |= {"q_weight": zeros(head_dim), "k_weight": zeros(head_dim)}
        if bounds:
            options |= dict.fromkeys(
                ("key_min", "key_max"), zeros(2, kv_heads, head_dim, dtype=f32)
            )
        qk_norm_rope_write(
            q, k, v, positions=torch.arange(16), cos_sin_cache=zeros(64, head_dim, dtype=f32),
            slot_mapping=torch.arange(16), k_cache=kv, v_cache=kv, **options,
        )  # fmt: skip

    def draw(**options):
        row = torch.ones(4)
        sample(
            zeros(4, 151936), temperature=row, seeds=row.long(), positions=row.long(),
            return_logprobs=True, **options,
        )  # fmt: skip

    def gemm(rows, quantize=None):
        weight = zeros(4096, 4096) if quantize is None else quantize(torch.ones(4096, 4096))
        x = zeros(rows, 4096)
        if quantize is None:
            skinny_gemm(x, weight)
            return
        skinny_gemm(
            x, weight.data, scales=weight.scales, zeros=weight.zeros, group_size=weight.group_size
        )

    def experts(tokens, dtype=bf16):
        """Gate and up of Qwen3-30B-A3B, of which a token takes 8 of 128 experts."""
        rows = torch.zeros(8 * tokens, dtype=torch.int64)
        starts = zeros(129, dtype=torch.int32)
        weight = zeros(1, 1536, 2048, dtype=dtype).expand(128, -1, -1)
        grouped_gemm(zeros(tokens, 2048, dtype=dtype), weight, starts, rows=rows)

    filters = {"top_k": torch.ones(4, dtype=torch.int64), "top_p": torch.ones(4),
               "min_p": torch.ones(4)}  # fmt: skip
    counts = zeros(4, 151936, dtype=torch.int32)
    penalties = {"repetition_penalty": torch.ones(4), "frequency_penalty": torch.ones(4),
                 "presence_penalty": torch.ones(4), "output_counts": counts,
                 "prompt_mask": counts.bool()}  # fmt: skip
    ids = torch.arange(2)
    kv = cache(4, 128)
    query = zeros(4, 28, 128)
    listed = zeros(4, 4, 16, dtype=torch.int32)

    yield "decode 28/4 d128", lambda: decode(28, 4, 128)
    yield "decode 14/2 d64", lambda: decode(14, 2, 64)
    yield (
        "decode 32/8 d80 window cap",
        lambda: decode(32, 8, 80, sliding_window=4096, soft_cap=50.0),
    )
    yield "decode 28/4 d128 rows 5", lambda: decode(28, 4, 128, rows=5)
    yield "decode 28/4 d128 fp8", lambda: decode(28, 4, 128, kv_dtype=fp8)
    yield "decode 28/4 d128 int8", lambda: decode(28, 4, 128, kv_dtype=torch.int8)
    fp16 = torch.float16
    yield "decode 8/1 d96 fp16", lambda: decode(8, 1, 96, kv_dtype=fp16, dtype=fp16)
    yield "prefill 28/4 d128", lambda: prefill(28, 4, 128)
    yield "prefill 14/2 d64", lambda: prefill(14, 2, 64)
    yield (
        "prefill 32/8 d96 window cap",
        lambda: prefill(32, 8, 96, sliding_window=4096, soft_cap=50.0),
    )
    yield "prefill 28/4 d128 fp8", lambda: prefill(28, 4, 128, kv_dtype=fp8)
    yield "prefill 28/4 d128 int8", lambda: prefill(28, 4, 128, kv_dtype=torch.int8)
    yield (
        "add_rms_norm 3584",
        lambda: add_rms_norm(zeros(4, 3584), zeros(4, 3584), zeros(3584), 1e-6),
    )
    yield "add_rms_norm 3584 alone", lambda: add_rms_norm(zeros(4, 3584), None, zeros(3584), 1e-6)
    yield "swiglu 18944", lambda: swiglu(zeros(4, 2 * 18944))
    yield "rope 28/4 d128", lambda: rope(28, 4, 128)
    yield "rope 32/8 d128 norm fp8 bounds", lambda: rope(32, 8, 128, fp8, True, True)
    yield "rope 28/4 d128 int8", lambda: rope(28, 4, 128, torch.int8)
    yield "sample plain", draw
    yield "sample filters", lambda: draw(**filters)
    yield "sample all", lambda: draw(**filters, **penalties)
    yield "kv_block_gather", lambda: kv_blocks.kv_block_gather(kv, ids)
    yield "kv_block_scatter", lambda: kv_blocks.kv_block_scatter(kv.clone(), kv, ids)
    yield "kv_block_copy", lambda: kv_blocks.kv_block_copy(kv, ids, ids)
    yield "skinny_gemm 16 bf16", lambda: gemm(16)
    yield "skinny_gemm 64 bf16", lambda: gemm(64)
    yield "skinny_gemm 16 int8", lambda: gemm(16, quantize_int8)
    yield "skinny_gemm 16 int8 groups", lambda: gemm(16, lambda w: quantize_int8(w, 128))
    yield "skinny_gemm 16 int4", lambda: gemm(16, quantize_int4)
    yield "skinny_gemm 64 int4", lambda: gemm(64, quantize_int4)
    if target != "sm_80":
        yield "skinny_gemm 16 fp8", lambda: gemm(16, quantize_fp8)
    yield "grouped_gemm 16 rows", lambda: experts(4)
    yield "grouped_gemm 64 rows", lambda: experts(1024)
    yield "grouped_gemm 64 rows fp32", lambda: experts(1024, f32)
    bounds = zeros(2, 4, 128, dtype=f32)
    yield "page_scores", lambda: quest.page_scores(query, bounds, bounds, tables, lens)
    yield (
        "page_list_attention",
        lambda: quest.page_list_attention(query, kv, kv, tables, lens, listed, scale=0.1),
    )
    yield (
        "centroid_weights",
        lambda: squeezed.centroid_weights(
            query, zeros(4, 512, 128), zeros(4, 512, dtype=torch.int32), scale=0.1
        ),
    )
    yield (
        "key_list_attention",
        lambda: squeezed.key_list_attention(
            query,
            kv,
            kv,
            tables,
            lens,
            listed.repeat(1, 1, 16),
            listed[:, :, 0].contiguous(),
            scale=0.1,
        ),
    )
    yield (
        "snapkv_votes",
        lambda: snapkv.snapkv_votes(zeros(4, 32, 28, 128), kv, tables, lens, scale=0.1),
    )


TYPES = {
    "bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "int64": "i64", "int32": "i32",
    "int8": "i8", "uint8": "u8", "bool": "i1", "float8_e4m3fn": "fp8e4nv", "float8_e5m2": "fp8e5",
}  # fmt: skip


def describe(kernel, bound):
    """(signature, constants, attributes) as Triton's launcher would derive them."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        name, value = parameter.name, bound[parameter.name]
        free = parameter.do_not_specialize
        one = isinstance(value, int) and value == 1 and not free
        if parameter.is_constexpr or value is None or one:
            signature[name] = "constexpr"
            constants[name] = value
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and not free:
                attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "*" + TYPES[str(value.dtype).removeprefix("torch.")]
            if value.data_ptr() % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def resources_nvidia(compiled, binaries):
    """Registers, stack and shared bytes from the ELF; spills and tensor instructions from SASS."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [binaries / "cuobjdump", "-res-usage", file.name],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        sass = subprocess.run(
            [binaries / "nvdisasm", "-c", "-novliw", file.name],
            capture_output=True, text=True,
        ).stdout  # fmt: skip
        if not sass:
            sass = subprocess.run(
                [binaries / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True
            ).stdout
    number = {key: int(value) for key, value in re.findall(r"(REG|STACK):(\d+)", usage)}
    return {
        "registers": number["REG"],
        "stack": number["STACK"],
        "shared": compiled.metadata.shared,
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        "tensor_core": len(re.findall(r"\b(?:HMMA|HGMMA|QGMMA|QMMA|IMMA|UTC\w*MMA)\b", sass)),
    }


def resources_amd(compiled):
    """The same from the assembly's metadata; registers are vector registers.

    Scalar registers spilled into lanes of vector registers touch no memory and are not counted.
    """
    text = compiled.asm["amdgcn"]

    def last(key):
        return int(re.findall(rf"\.{key}:\s+(\d+)", text)[-1])

    return {
        "registers": last("vgpr_count"),
        "stack": last("private_segment_fixed_size"),
        "shared": compiled.metadata.shared,  # allocated at launch, so 0 in the assembly
        "spills": last("vgpr_spill_count"),
        "tensor_core": len(re.findall(r"\bv_s?mfmac?_", text)),
    }


def compile_target(target):
    """{variant: resources} for one target."""
    import triton
    from bytes_in_flight import in_flight  # beside this file, which runs as a script
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    backend, arch, warp_size, _ = TARGETS[target]
    binaries = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    table, seen = {}, set()
    for name, kernel, bound, options in record_launches(target):
        signature, constants, attributes = describe(kernel, bound)
        key = (kernel.__name__, str(signature), str(constants), str(attributes), str(options))
        if key in seen:
            continue
        seen.add(key)
        source = ASTSource(kernel, signature, constants, attributes)
        compiled = triton.compile(
            source, target=GPUTarget(backend, arch, warp_size), options=options
        )
        if backend == "hip":
            table[name] = resources_amd(compiled)
        else:
            table[name] = resources_nvidia(compiled, binaries)
            table[name]["in_flight"] = list(in_flight(compiled.asm["ttgir"]))
        table[name]["warps"] = options.get("num_warps", 4)
    return table


def run_in_process(target):
    """compile_target in a fresh interpreter; returns its table."""
    done = subprocess.run(
        [sys.executable, __file__, target], capture_output=True, text=True, timeout=900
    )
    if done.returncode:
        raise RuntimeError(f"compiling for {target} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout)


def main():
    """Print one target's table, or rewrite the committed one."""
    if sys.argv[1] != "--write":
        print(json.dumps(compile_target(sys.argv[1])))
        return
    import triton
    from bytes_in_flight import document

    tables = {target: run_in_process(target) for target in TARGETS}
    TABLE.write_text(json.dumps({"triton": triton.__version__, **tables}, indent=1) + "\n")
    text = DOCUMENT.read_text()
    head, _, rest = text.partition(MARK)
    _, _, tail = rest.partition("\n\n")
    DOCUMENT.write_text(f"{head}{MARK}{document(tables['sm_90'])}\n{tail}")


if __name__ == "__main__":
    main()
