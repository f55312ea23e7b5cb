"""What ABX is scored on, of the utterances that are evaluated."""

from __future__ import annotations

from pathlib import Path

import pytest

from sonorant.data.corpus import Utterance
from sonorant.evaluation.abx.items import Item, read_items
from sonorant.steps.items import choose_items

PHONES = (("SIL", 0.0, 0.1), ("k", 0.1, 0.2), ("ae", 0.2, 0.3), ("t", 0.3, 0.4))
TWO = """#file onset offset #phone prev-phone next-phone speaker
b 0.1 0.3 ae k t s
x 0.2 0.3 ih k t s
b 0.4 1.0 t ae SIL s
"""


def utterance(name: str, speaker: str = "s", phones: tuple[tuple[str, float, float], ...] | None = None) -> Utterance:
    """Half a second of speech."""
    return Utterance(name, "test", "field", speaker, 8_000, Path(f"{name}.flac"), None, phones=phones)


def test_without_a_file_items_are_of_the_phones(tmp_path: Path) -> None:
    items = choose_items(None, [utterance("a", phones=PHONES), utterance("b")])
    assert [(item.phone, item.onset, item.offset) for item in items.any_context] == list(PHONES[1:])
    assert items.in_context == [Item("a", 0.1, 0.4, "ae", "k", "t", "s")]
    assert (items.utterances, items.notes) == (["a"], [])
    items.write(tmp_path)
    assert read_items(tmp_path / "phones.item") == items.any_context
    assert read_items(tmp_path / "triphones.item") == items.in_context


def test_a_file_is_about_some_of_the_utterances(tmp_path: Path) -> None:
    (tmp_path / "two.item").write_text(TWO)
    items = choose_items(str(tmp_path / "two.item"), [utterance("c"), utterance("b", phones=PHONES)])
    assert items.any_context == items.in_context == [i for i in read_items(tmp_path / "two.item") if i.file == "b"]
    assert items.utterances == ["b"]
    assert items.notes == [
        f"ABX errors are of 2 items of {tmp_path / 'two.item'}.",
        "Left out are those of 1 of the 2 utterances that it names: not evaluated.",
        "1 of these items end after their utterance does: their times may be of other audio.",
    ]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", "found no item, wanted one at least: name a file that has some"),
        ("#file onset offset #phone prev-phone next-phone speaker\n\n", "found no item, wanted one at least"),
        ("y 0 1 n ae d s\nx 0 1 n ae d s\n", "found items of 2 utterances, 'x' the first, wanted ids such as 'a', for"),
        ("a 0 1 n ae d\n", "found 'a 0 1 n ae d', wanted 'file onset"),
    ],
)
def test_a_file_without_items_of_the_utterances_is_one_line(tmp_path: Path, text: str, wanted: str) -> None:
    path = tmp_path / "some.item"
    path.write_text(text)
    with pytest.raises(ValueError, match=wanted) as error:
        choose_items(str(path), [utterance("b"), utterance("a")])
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_names_that_the_file_cannot_hold_leave_it_out(tmp_path: Path) -> None:
    items = choose_items(None, [utterance("a", "speaker one", PHONES)])
    assert items.notes == [
        "phones.item and triphones.item are not written: 'speaker one' cannot stand in a column of such a file."
    ]
    items.write(tmp_path)
    choose_items(None, [utterance("a")]).write(tmp_path)  # nor is anything where no utterance has phones
    assert list(tmp_path.iterdir()) == []
