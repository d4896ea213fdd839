"""Labels from word statistics: known answers, and what they do with nothing to say."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autointerp.collect import Example, LatentExamples
from autointerp.score import Detection
from autointerp.statistics import (
    MAX_WORDS,
    detect_by_words,
    distinctive_words,
    statistics_label,
)

SENTENCES = {
    1: "left pleural effusion is seen .",
    2: "small pleural effusion on the left .",
    3: "no nodule is seen .",
    4: "the heart is normal in size .",
}


class Words:
    """A tokenizer whose tokens are whole sentences."""

    def decode(self, ids):
        return " ".join(SENTENCES[i] for i in ids)


def examples(**sides):
    def side(name):
        return [Example(f"s{i}", f"p{i}", [i], [1.0]) for i in sides.get(name, ())]

    names = ("explain", "contrast", "positives", "negatives")
    return LatentExamples(7, *(side(name) for name in names), reference=1.0)


def test_a_latent_is_named_by_the_words_its_sentences_share():
    label = statistics_label(examples(explain=[1, 2] * 10, contrast=[3, 4] * 10), Words())
    assert set(label.split()) >= {"left", "pleural", "effusion"}
    assert "is" not in label.split()


def test_no_difference_is_no_label():
    assert statistics_label(examples(explain=[1, 3], contrast=[1, 3]), Words()) is None
    assert statistics_label(examples(), Words()) is None


def test_detection_by_words_is_balanced():
    seen = examples(positives=[1, 2], negatives=[3, 4, 4])
    assert detect_by_words("left pleural effusion", seen, Words()) == Detection(1.0, 5, 1.0)
    assert detect_by_words("nodule", seen, Words()).balanced_accuracy == pytest.approx(1 / 3)
    assert detect_by_words("nowhere", seen, Words()).balanced_accuracy == 0.5
    assert detect_by_words("nowhere", examples(positives=[1]), Words()).balanced_accuracy is None


TEXTS = st.lists(st.text("abc ", max_size=12), max_size=8)


@given(TEXTS, TEXTS)
def test_words_come_from_inside_and_swapping_sides_names_none_twice(one, two):
    first, second = distinctive_words(one, two), distinctive_words(two, one)
    assert len(first) <= MAX_WORDS
    assert set(first) <= set(" ".join(one).split())
    assert not set(first) & set(second)
