# mypy: disable-error-code="no-untyped-def,no-untyped-call,no-any-return"
"""The lowest logit of each row that min-p, top-k and top-p keep, found without a sort.

Steps 1 to 5 of the sampler. Bytes moved: up to 16 passes over a row's logits for top-k and as many
for top-p; a row stays in L2 between them.
"""

from __future__ import annotations

from .dispatch import tl, triton


@triton.jit
def load_logits(
    logits_ptr, stride, row, token, mask, repetition_ptr, frequency_ptr, presence_ptr,
    prompt_ptr, counts_ptr, bias_ptr, vocab,
    HAS_REPETITION: tl.constexpr, HAS_FREQUENCY: tl.constexpr, HAS_PRESENCE: tl.constexpr,
    HAS_PROMPT: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Step 1: (raw, penalised) logits in float32, -inf outside the vocabulary."""
    raw = tl.load(logits_ptr + row * stride + token, mask=mask, other=float("-inf"))
    raw = raw.to(tl.float32)
    x = raw
    plane = row * vocab + token
    if HAS_REPETITION or HAS_FREQUENCY or HAS_PRESENCE:
        count = tl.load(counts_ptr + plane, mask=mask, other=0).to(tl.int32)
        if HAS_REPETITION:
            seen = count > 0
            if HAS_PROMPT:
                seen = seen | (tl.load(prompt_ptr + plane, mask=mask, other=0) != 0)
            factor = tl.load(repetition_ptr + row).to(tl.float32)
            x = tl.where(seen, tl.where(x > 0, x / factor, x * factor), x)
        if HAS_FREQUENCY:
            x -= tl.load(frequency_ptr + row).to(tl.float32) * count.to(tl.float32)
        if HAS_PRESENCE:
            presence = tl.load(presence_ptr + row).to(tl.float32)
            x -= tl.where(count > 0, presence, 0.0)
    if HAS_BIAS:
        x += tl.load(bias_ptr + plane, mask=mask, other=0.0).to(tl.float32)
    return raw, x


@triton.jit
def _to_order(x):
    """A non-negative int64 that rises with the float32 x."""
    bits = x.to(tl.int32, bitcast=True).to(tl.int64)
    return tl.where(bits < 0, -1 - bits - 2147483648, bits) + 2147483648


@triton.jit
def _from_order(order):
    order = order - 2147483648
    bits = tl.where(order < 0, -1 - order - 2147483648, order)
    return bits.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _pivots(low, high):
    """Three values that cut what is between into quarters; the first may equal `low`."""
    return low + (high - low) // 4, low + (high - low) // 2, low + (high - low) * 3 // 4


@triton.jit
def _narrowed(low, high, first, second, third, at_first, at_second, at_third):
    """The quarter whose lower end still has enough above it and whose upper end has not."""
    low = tl.where(at_first, first, low)
    low = tl.where(at_second, second, low)
    low = tl.where(at_third, third, low)
    high = tl.where(at_third, high, third)
    high = tl.where(at_second, high, second)
    high = tl.where(at_first, high, first)
    # A pivot equal to low repeats what is known: never below the floor.
    return low, tl.maximum(high, low + 1)


@triton.jit
def threshold_kernel(
    logits_ptr, stride, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr,
    repetition_ptr, frequency_ptr, presence_ptr, prompt_ptr, counts_ptr, bias_ptr,
    threshold_ptr, vocab,
    HAS_TOP_K: tl.constexpr, HAS_TOP_P: tl.constexpr, HAS_MIN_P: tl.constexpr,
    HAS_REPETITION: tl.constexpr, HAS_FREQUENCY: tl.constexpr, HAS_PRESENCE: tl.constexpr,
    HAS_PROMPT: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The lowest kept logit of one row (after temperature), by quartering the float32 values.

    Each pass over the row tests three pivots at once, so 16 passes fix all 32 bits of the exact
    threshold. A row of 128k logits stays in L2 between passes.
    """
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperature_ptr + row).to(tl.float32)
    if temperature <= 0:
        tl.store(threshold_ptr + row, float("-inf"))
        return
    lanes = tl.arange(0, BLOCK)
    highest = tl.full((), float("-inf"), tl.float32)
    for start in range(0, vocab, BLOCK):
        token = start + lanes
        _, x = load_logits(
            logits_ptr, stride, row, token, token < vocab, repetition_ptr, frequency_ptr,
            presence_ptr, prompt_ptr, counts_ptr, bias_ptr, vocab,
            HAS_REPETITION, HAS_FREQUENCY, HAS_PRESENCE, HAS_PROMPT, HAS_BIAS,
        )  # fmt: skip
        highest = tl.maximum(highest, tl.max(x / temperature, 0))
    floor = tl.full((), float("-inf"), tl.float32)
    if HAS_MIN_P:
        floor = highest + tl.log(tl.load(min_p_ptr + row).to(tl.float32))

    if HAS_TOP_K:
        top_k = tl.load(top_k_ptr + row).to(tl.int32)
        if (top_k > 0) & (top_k < vocab):
            low = _to_order(floor)
            high = _to_order(highest) + 1
            while high - low > 1:
                first, second, third = _pivots(low, high)
                first_value = _from_order(first)
                second_value = _from_order(second)
                third_value = _from_order(third)
                first_count = tl.zeros((), tl.int32)
                second_count = tl.zeros((), tl.int32)
                third_count = tl.zeros((), tl.int32)
                for start in range(0, vocab, BLOCK):
                    token = start + lanes
                    _, x = load_logits(
                        logits_ptr, stride, row, token, token < vocab, repetition_ptr,
                        frequency_ptr, presence_ptr, prompt_ptr, counts_ptr, bias_ptr, vocab,
                        HAS_REPETITION, HAS_FREQUENCY, HAS_PRESENCE, HAS_PROMPT, HAS_BIAS,
                    )  # fmt: skip
                    x = x / temperature
                    first_count += tl.sum((x >= first_value).to(tl.int32), 0)
                    second_count += tl.sum((x >= second_value).to(tl.int32), 0)
                    third_count += tl.sum((x >= third_value).to(tl.int32), 0)
                low, high = _narrowed(
                    low, high, first, second, third,
                    first_count >= top_k, second_count >= top_k, third_count >= top_k,
                )  # fmt: skip
            floor = _from_order(low)

    if HAS_TOP_P:
        top_p = tl.load(top_p_ptr + row).to(tl.float32)
        if top_p < 1:
            mass = tl.zeros((), tl.float32)
            for start in range(0, vocab, BLOCK):
                token = start + lanes
                _, x = load_logits(
                    logits_ptr, stride, row, token, token < vocab, repetition_ptr,
                    frequency_ptr, presence_ptr, prompt_ptr, counts_ptr, bias_ptr, vocab,
                    HAS_REPETITION, HAS_FREQUENCY, HAS_PRESENCE, HAS_PROMPT, HAS_BIAS,
                )  # fmt: skip
                x = x / temperature
                mass += tl.sum(tl.where(x >= floor, tl.exp(x - highest), 0.0), 0)
            wanted = tl.maximum(top_p, 0.0) * mass
            # exp(-104) is 0 in float32: values further below the maximum carry no mass.
            low = _to_order(tl.maximum(floor, highest - 104.0))
            high = _to_order(highest) + 1
            while high - low > 1:
                first, second, third = _pivots(low, high)
                first_value = _from_order(first)
                second_value = _from_order(second)
                third_value = _from_order(third)
                first_mass = tl.zeros((), tl.float32)
                second_mass = tl.zeros((), tl.float32)
                third_mass = tl.zeros((), tl.float32)
                for start in range(0, vocab, BLOCK):
                    token = start + lanes
                    _, x = load_logits(
                        logits_ptr, stride, row, token, token < vocab, repetition_ptr,
                        frequency_ptr, presence_ptr, prompt_ptr, counts_ptr, bias_ptr, vocab,
                        HAS_REPETITION, HAS_FREQUENCY, HAS_PRESENCE, HAS_PROMPT, HAS_BIAS,
                    )  # fmt: skip
                    x = x / temperature
                    weight = tl.exp(x - highest)
                    first_mass += tl.sum(tl.where(x >= first_value, weight, 0.0), 0)
                    second_mass += tl.sum(tl.where(x >= second_value, weight, 0.0), 0)
                    third_mass += tl.sum(tl.where(x >= third_value, weight, 0.0), 0)
                low, high = _narrowed(
                    low, high, first, second, third,
                    first_mass >= wanted, second_mass >= wanted, third_mass >= wanted,
                )  # fmt: skip
            floor = _from_order(low)
    tl.store(threshold_ptr + row, floor)
