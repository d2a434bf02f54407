"""Rotary tables equal those of transformers, and the rotation equals its formula."""

import pytest
import torch

from tandem_kernels import KernelArgumentError, qk_norm_rope_write, rope_frequencies, rope_table

SCALINGS = {
    "default": None,
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    "yarn by mscale": {
        "rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096,
        "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 0.7,
    },
    "yarn untruncated": {
        "rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096,
        "truncate": False, "attention_factor": 1.1,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_equal_those_of_transformers(name):
    transformers = pytest.importorskip("transformers", reason="the reference implementation")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = SCALINGS[name] or {"rope_type": "default"}
    parameters = {**scaling, "rope_theta": 500000.0}
    config = transformers.LlamaConfig(
        hidden_size=512, num_attention_heads=8, head_dim=64, max_position_embeddings=131072,
        rope_parameters=parameters,
    )  # fmt: skip

    ours, factor = rope_frequencies(64, 500000.0, SCALINGS[name])

    if scaling["rope_type"] == "default":
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        theirs = LlamaRotaryEmbedding(config).inv_freq
        their_factor = 1.0
    else:
        theirs, their_factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, "cpu")
    torch.testing.assert_close(ours.float(), theirs, rtol=2e-6, atol=0)
    assert factor == pytest.approx(their_factor)


def test_tables_hold_cosines_then_sines():
    table = rope_table(8, 131073, dtype=torch.float64)

    frequency = 10000.0 ** (-2 / 8)
    angle = torch.tensor(131072 * frequency, dtype=torch.float64)
    assert table.shape == (131073, 8)
    torch.testing.assert_close(table[131072, 1], angle.cos())
    torch.testing.assert_close(table[131072, 5], angle.sin())


def test_rotation_depends_on_the_distance_of_positions_only():
    table = rope_table(16, 100, dtype=torch.float64)
    q, k = (torch.randn(1, 1, 16, dtype=torch.float64) for _ in range(2))

    def product(q_position, k_position):
        cache = torch.zeros(1, 1, 64, 16, dtype=torch.float64)
        both = torch.cat([q, q]), torch.cat([k, k])
        rotated = qk_norm_rope_write(
            *both, both[1], positions=torch.tensor([q_position, k_position]),
            cos_sin_cache=table, slot_mapping=torch.tensor([0, 1]), k_cache=cache,
            v_cache=cache.clone(),
        )  # fmt: skip
        return rotated[0, 0] @ cache[0, 0, 1]

    torch.testing.assert_close(product(10, 3), product(97, 90))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"head_dim": 7}, "head_dim=7"),
        ({"scaling": {"rope_type": "spiral"}}, "rope_type='spiral' is unknown"),
        ({"scaling": {"rope_type": "linear"}}, "lacks 'factor'"),
        ({"scaling": {"rope_type": "yarn", "factor": 2}}, "lacks 'original_max_position"),
    ],
)
def test_unknown_scaling_is_refused(arguments, message):
    with pytest.raises(KernelArgumentError, match=message):
        rope_frequencies(**{"head_dim": 8, **arguments})
