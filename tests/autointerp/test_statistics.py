"""Labels from word statistics: known answers, and what they do with nothing to say."""

from hypothesis import given
from hypothesis import strategies as st

from autointerp.statistics import MAX_WORDS, distinctive_words, words_express

LEFT = ["left pleural effusion is seen .", "small pleural effusion on the left ."]
OTHER = ["no nodule is seen .", "the heart is normal in size ."]


def test_a_latent_is_named_by_the_words_its_sentences_share():
    assert set(distinctive_words(LEFT * 10, OTHER * 10)) == {"left", "pleural", "effusion"}


def test_no_difference_is_no_label():
    assert distinctive_words(LEFT, LEFT) == []
    assert distinctive_words([], OTHER) == []
    assert distinctive_words(["effusion"] * 9, []) == []


def test_words_are_chosen_together():
    """Each word alone is in one half of the firing texts or in silent ones; two tell them best."""
    on = ["right effusion"] * 60
    off = ["right nodule"] * 10 + ["left effusion"] * 10 + ["heart is clear"] * 100
    assert distinctive_words(on, off) == ["right", "effusion"]


def test_a_text_expresses_most_words_and_no_opposite():
    assert words_express("left pleural effusion", LEFT[1])
    assert not words_express("left pleural effusion", "right pleural effusion .")
    assert not words_express("nodule", LEFT[0])


TEXTS = st.lists(st.text("abc ", max_size=12), max_size=8)


@given(TEXTS, TEXTS)
def test_words_come_from_inside_and_swapping_sides_names_none_twice(one, two):
    first, second = distinctive_words(one, two), distinctive_words(two, one)
    assert len(first) <= MAX_WORDS
    assert set(first) <= set(" ".join(one).split())
    assert not set(first) & set(second)
