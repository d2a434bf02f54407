"""How rare a prompt's words are in English at large."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tandem_router.predictor.reading import hand_features, ngrams, rarity


def of(prompt: str) -> dict[str, float]:
    return dict(
        zip(hand_features.NAMES, hand_features.features(ngrams.read(prompt)).tolist(), strict=True)
    )


def test_a_question_in_rare_words_is_rarer_than_one_in_common_words() -> None:
    common = of("What time of the day do people go to work by car?")
    rare = of("Does bacteriophage transduction precede conjugation in prokaryotes?")

    for name in rarity.NAMES:
        assert rare[name] >= common[name], name
    assert rare["rarity_mean"] > common["rarity_mean"] + 1.0


def test_a_word_nobody_lists_is_rarer_than_all_that_are_listed() -> None:
    found = of("the zxqvyt")

    assert found["unlisted_words"] == 0.5
    assert found["rarity_highest"] > of("the aardvark")["rarity_highest"]


def test_case_and_repetition_do_not_change_rarity() -> None:
    once, shouted = of("entropy of the gas"), of("ENTROPY of the gas, the gas, the gas")

    assert [once[name] for name in rarity.NAMES] == [shouted[name] for name in rarity.NAMES]


def test_letters_that_stand_for_options_and_variables_are_no_words() -> None:
    plain, lettered = of("solve for the root"), of("solve for the root x A B C D")

    assert [plain[name] for name in rarity.NAMES] == [lettered[name] for name in rarity.NAMES]


@given(st.text(alphabet="x +-1234567890?\n", max_size=200))
def test_a_prompt_without_words_has_no_rarity(prompt: str) -> None:
    if "xx" not in prompt:
        assert [of(prompt)[name] for name in rarity.NAMES] == [0.0] * len(rarity.NAMES)


@given(st.text(max_size=300))
def test_shares_are_shares_and_quantiles_are_in_order(prompt: str) -> None:
    found = of(prompt)

    assert 0.0 <= found["unlisted_words"] <= found["very_rare_words"] <= found["rare_words"] <= 1.0
    quantiles = ("rarity_median", "rarity_upper_quarter", "rarity_upper_tenth", "rarity_highest")
    values = [found[name] for name in quantiles]
    assert values == sorted(values)
