"""Error rates of what was recognised (PER, WER, CER), counted by jiwer, and the one way texts are written before.

Edits over reference tokens, both summed over utterances. An empty hypothesis is all deletions; a reference without a
token is refused, for nothing can be said of it.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from sonorant.evaluation.abx.items import SILENCE

APOSTROPHES = "'’ʼ＇"
BOUNDARY = "|"
"""The token between two words."""


def normalise_text(text: str) -> str:
    """A transcript as it is recognised and counted: NFKC, upper case, words one space apart.

    Letters (with their marks), digits and apostrophes inside a word are kept; all else separates words: hyphens,
    punctuation, symbols. So "Don’t – re-do it!" becomes "DON'T RE DO IT".
    """
    kept = []
    for sign in unicodedata.normalize("NFKC", text).upper():
        if sign in APOSTROPHES:
            kept.append("'")
        else:
            kept.append(sign if unicodedata.category(sign)[0] in "LMN" else " ")
    return " ".join(word for part in "".join(kept).split() if (word := part.strip("'")))


def characters_of(text: str) -> tuple[str, ...]:
    """A normalised text's tokens: its characters, and BOUNDARY between words."""
    return tuple(BOUNDARY if sign == " " else sign for sign in text)


def text_of(tokens: Sequence[str]) -> str:
    """The text that tokens spell; boundaries without a word between them are one."""
    return " ".join("".join(tokens).replace(BOUNDARY, " ").split())


def without_silence(phones: Sequence[str]) -> list[str]:
    """What is said."""
    return [phone for phone in phones if phone != SILENCE]


def error_rate(references: Sequence[Sequence[str]], hypotheses: Sequence[Sequence[str]]) -> float:
    """Edits over reference tokens, both summed; ValueError where there are not as many of both, or as `count_edits`."""
    if not references or len(references) != len(hypotheses):
        found = f"{len(references)} references and {len(hypotheses)} hypotheses"
        raise ValueError(f"error rate: found {found}, wanted as many, and some: give one of each an utterance")
    counted = [
        count_edits(f"reference {row}", *pair) for row, pair in enumerate(zip(references, hypotheses, strict=True))
    ]
    return sum(edits for edits, _ in counted) / sum(tokens for _, tokens in counted)


def count_edits(name: str, reference: Sequence[str], hypothesis: Sequence[str]) -> tuple[int, int]:
    """The fewest insertions, deletions and substitutions of tokens, and how many tokens the reference has.

    Raises ValueError, with the name, where it has none.
    """
    from jiwer import process_words

    if not reference:
        raise ValueError(f"error rate: found no token in {name}, wanted one at least: leave it out")
    # Numbers in place of names: jiwer splits at spaces, and a name may hold some.
    numbers: dict[str, str] = {}
    lines = (" ".join(numbers.setdefault(token, str(len(numbers))) for token in one) for one in (reference, hypothesis))
    found = process_words(*lines)
    return found.substitutions + found.deletions + found.insertions, len(reference)
