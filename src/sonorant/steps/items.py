"""What ABX is scored on: the phones of the evaluated utterances, or an `.item` file about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sonorant.data.corpus import Utterance
from sonorant.data.frames import FRAME_SECONDS
from sonorant.evaluation.abx.items import Item, find_unwritable, phone_items, read_items, triphone_items, write_items


@dataclass(frozen=True)
class Items:
    """Items for any context and in context, and the ids of the utterances that they are sought in."""

    any_context: Sequence[Item]
    in_context: Sequence[Item]
    utterances: Sequence[str]
    notes: Sequence[str] = ()
    """What a reader must know of them."""

    def write(self, folder: Path) -> None:
        """Write them for other tools, where there are utterances to have any and every name fits into such a file."""
        if self.utterances and find_unwritable(self.any_context) is None:
            write_items(folder / "phones.item", self.any_context)
            write_items(folder / "triphones.item", self.in_context)


def choose_items(path: str | None, utterances: Sequence[Utterance]) -> Items:
    """The items of the file that is named or, where none is, of the utterances' phones."""
    return of_phones(utterances) if path is None else of_file(Path(path), utterances)


def of_phones(utterances: Sequence[Utterance]) -> Items:
    """Any-context scores are of phones; in-context scores are of whole triphones, as in libri-light."""
    phones: list[Item] = []
    triphones: list[Item] = []
    aligned = [utterance for utterance in utterances if utterance.phones is not None]
    for utterance in aligned:
        phones += phone_items(utterance.id, utterance.speaker, utterance.phones or ())
        triphones += triphone_items(utterance.id, utterance.speaker, utterance.phones or ())
    name = find_unwritable(phones)
    told = f"phones.item and triphones.item are not written: {name!r} cannot stand in a column of such a file."
    return Items(phones, triphones, [utterance.id for utterance in aligned], [] if name is None else [told])


def of_file(path: Path, utterances: Sequence[Utterance]) -> Items:
    """The file's items of these utterances, for scores of both kinds; those in context keep the file's contexts.

    Raises ValueError where the file cannot be read, or is about none of the utterances.
    """
    items = read_items(path)
    if not items:
        raise ValueError(f"{path}: found no item, wanted one at least: name a file that has some")
    seconds = {utterance.id: utterance.seconds for utterance in utterances}
    named = {item.file for item in items}
    kept = [item for item in items if item.file in seconds]
    if not kept:
        raise ValueError(
            f"{path}: found items of {len(named)} utterances, {min(named)!r} the first, wanted ids such as "
            f"{min(seconds)!r}, for none is evaluated: name a file of this corpus, or its source and split"
        )
    notes = [f"ABX errors are of {len(kept)} items of {path}."]
    if unknown := len(named - seconds.keys()):
        notes.append(f"Left out are those of {unknown} of the {len(named)} utterances that it names: not evaluated.")
    if late := sum(item.offset > seconds[item.file] + FRAME_SECONDS for item in kept):
        notes.append(f"{late} of these items end after their utterance does: their times may be of other audio.")
    about = [utterance.id for utterance in utterances if utterance.id in named]
    return Items(kept, kept, about, notes)
