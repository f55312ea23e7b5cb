"""Texts are written one way before their errors are counted, and counted as jiwer does."""

from __future__ import annotations

import re

import jiwer
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sonorant.evaluation.errors import characters_of, count_edits, error_rate, normalise_text, text_of, without_silence


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("Don't – re-do it!", "DON'T RE DO IT"),
        ("  'Tis  the “season” ", "TIS THE SEASON"),
        ("Dogs’ tails", "DOGS TAILS"),
        ("Ça coûte 3 €", "ÇA COÛTE 3"),
        ("straße ﬁn", "STRASSE FIN"),
        ("हिन्दी", "हिन्दी"),
        ("", ""),
        ("… —", ""),
    ],
)
def test_texts_are_written_one_way(text: str, wanted: str) -> None:
    assert normalise_text(text) == wanted


@given(st.text(max_size=30))
def test_once_is_enough(text: str) -> None:
    once = normalise_text(text)
    assert normalise_text(once) == once
    assert text_of(characters_of(once)) == once
    assert "|" not in once


WORDS = st.lists(st.sampled_from(["A", "BE", "SEE"]), max_size=6)


@given(WORDS.filter(bool), WORDS)
def test_words_and_characters_are_counted_as_jiwer_does(wanted: list[str], heard: list[str]) -> None:
    texts = " ".join(wanted), " ".join(heard)
    edits, tokens = count_edits("it", wanted, heard)
    assert edits / tokens == pytest.approx(jiwer.wer(*texts))
    edits, tokens = count_edits("it", characters_of(texts[0]), characters_of(texts[1]))
    assert edits / tokens == pytest.approx(jiwer.cer(*texts))


def test_nothing_heard_is_all_deletions() -> None:
    assert count_edits("it", ["a", "b"], []) == (2, 2)
    assert error_rate([["a", "b"], ["c"]], [[], ["c", "d"]]) == pytest.approx(1)


def test_nothing_said_is_refused() -> None:
    wanted = "error rate: found no token in utterance u1, wanted one at least: leave it out"
    with pytest.raises(ValueError, match=re.escape(wanted)):
        count_edits("utterance u1", [], ["a"])


def test_silence_is_not_said() -> None:
    assert without_silence(["SIL", "a", "SIL", "b"]) == ["a", "b"]
