"""The operations of Tandem's engine: Triton kernels for CUDA and ROCm, torch references for CPU.

Every public function checks its arguments (KernelArgumentError names argument, value and rule),
then runs Triton on a GPU tensor and the torch reference on a CPU tensor. One module per operation
holds formula, shapes, bytes moved, reference, kernel and launcher. `NAME_reference` in an
operation's module is the reference itself; it accepts float64. `warm_up(EngineShapes(...))`
compiles every variant an engine of those shapes launches.

Beyond the operations: `rope_table` and `rope_frequencies` (default, linear, llama3, yarn),
`quantize_*` and `dequantize` (weights of skinny_gemm), `select_pages` and `reset_page_bounds`
(Quest), `cluster_keys` and `select_keys` (Squeezed Attention), `pool_votes` (SnapKV) and
`gumbel_noise` (what `sample` adds); these are torch on every device.
"""

from .checks import BLOCK_SIZE, KernelArgumentError
from .grouped_gemm import grouped_gemm
from .kv_blocks import kv_block_copy, kv_block_gather, kv_block_scatter
from .noise import gumbel_noise
from .paged_decode import paged_decode_attention
from .prefill import prefill_attention
from .qk_norm_rope import qk_norm_rope_write
from .quantize import QuantizedWeight, dequantize, quantize_fp8, quantize_int4, quantize_int8
from .quest import page_list_attention, page_scores, reset_page_bounds, select_pages
from .rms_norm import add_rms_norm
from .rope import ROPE_TYPES, rope_frequencies, rope_table
from .sampler import SampleOutput, sample
from .skinny_gemm import MAX_ROWS, skinny_gemm
from .snapkv import pool_votes, snapkv_votes
from .squeezed import centroid_weights, cluster_keys, key_list_attention, select_keys
from .swiglu import swiglu
from .warm_up import EngineShapes, ExpertLayers, QuantizedLinear, warm_up

__all__ = [
    "BLOCK_SIZE",
    "MAX_ROWS",
    "ROPE_TYPES",
    "EngineShapes",
    "ExpertLayers",
    "KernelArgumentError",
    "QuantizedLinear",
    "QuantizedWeight",
    "SampleOutput",
    "add_rms_norm",
    "centroid_weights",
    "cluster_keys",
    "dequantize",
    "grouped_gemm",
    "gumbel_noise",
    "key_list_attention",
    "kv_block_copy",
    "kv_block_gather",
    "kv_block_scatter",
    "page_list_attention",
    "page_scores",
    "paged_decode_attention",
    "pool_votes",
    "prefill_attention",
    "qk_norm_rope_write",
    "quantize_fp8",
    "quantize_int4",
    "quantize_int8",
    "reset_page_bounds",
    "rope_frequencies",
    "rope_table",
    "sample",
    "select_keys",
    "select_pages",
    "skinny_gemm",
    "snapkv_votes",
    "swiglu",
    "warm_up",
]
