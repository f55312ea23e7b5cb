"""Retrieval measured on a published model: its speech side and the images in its gallery, as they are served."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Literal

import numpy as np

from sonorant.data.corpus import Utterance, read_waves
from sonorant.data.pairs import first_with_image, name_of, thumbnail
from sonorant.data.progress import shown_progress
from sonorant.evaluation.intervals import Estimate, ratio_of_sums
from sonorant.evaluation.measures import System
from sonorant.evaluation.report import Search, Shown
from sonorant.evaluation.retrieval import TOPS, Ranks, Rows, Vectors, first_of, plain_words, rank, related
from sonorant.inference import Speech

BATCH_UTTERANCES = 16
NUM_SHOWN = 5
PICTURE_SIDE = 96


@dataclass(frozen=True)
class Pairs:
    """Utterances (S) with their images (I): owners (S,) are rows of `names`, words (S,) what is said, numbered, None
    where an utterance has no text."""

    utterances: Sequence[Utterance]
    names: Sequence[str]
    owners: Rows
    words: Rows | None

    @classmethod
    def among(cls, known: Collection[str], utterances: Sequence[Utterance]) -> Pairs | None:
        """Those utterances whose image is known, None where there is none."""
        kept = [u for u in utterances if u.image is not None and name_of(u) in known]
        if not kept:
            return None
        names, owners = np.unique([name_of(u) for u in kept], return_inverse=True)
        texts = [plain_words(u.text or "") for u in kept]
        words = np.unique(texts, return_inverse=True)[1] if all(texts) else None
        return cls(kept, names.tolist(), owners, words)

    @cached_property
    def right(self) -> dict[str, tuple[list[Rows], list[Rows]]]:
        """The right images of each utterance and the right utterances of each image, by what makes them right."""
        kinds = {"": self.owners} | ({} if self.words is None else {"_by_class": self.words})
        return {kind: related(self.owners, labels, len(self.names)) for kind, labels in kinds.items()}


@dataclass(frozen=True)
class Hunt:
    """What a model makes of the pairs: vectors of utterances (S, E) and images (I, E)."""

    pairs: Pairs
    speech: Vectors
    images: Vectors

    @cached_property
    def ranks(self) -> dict[tuple[str, str], Ranks]:
        """Of both ways, by what makes a candidate right."""
        found = {}
        for kind, (images_of, utterances_of) in self.pairs.right.items():
            found["speech_to_image", kind] = rank(self.speech, self.images, images_of)
            found["image_to_speech", kind] = rank(self.images, self.speech, utterances_of)
        return found

    @property
    def scores(self) -> dict[str, float]:
        """Recalls and median ranks by name."""
        return named({way: ([r.recall(top) for top in TOPS], r.median) for way, r in self.ranks.items()})

    @property
    def estimates(self) -> dict[str, Estimate]:
        """Recalls with the influence of each query: of each utterance or, the other way, of each image."""
        asked = {"speech_to_image": [u.id for u in self.pairs.utterances], "image_to_speech": self.pairs.names}
        return {
            f"{way}_recall_at_{top}{kind}": ratio_of_sums(
                {name: (float(place <= top), 1.0) for name, place in zip(asked[way], ranks.places, strict=True)}
            )
            for (way, kind), ranks in self.ranks.items()
            for top in TOPS
        }

    @property
    def chance(self) -> System:
        """What a random order has on average, whatever the queries are."""
        ranks = self.ranks.items()
        scores = named({way: ([r.chance_recall(top) for top in TOPS], r.chance_median) for way, r in ranks})
        detail = f"a random order of {len(self.pairs.names)} images or {len(self.pairs.utterances)} utterances"
        known = {
            name: Estimate(scores[name], dict.fromkeys(estimate.influence, 0.0))
            for name, estimate in self.estimates.items()
        }
        return System("chance", "chance", detail, scores, known)


def named(found: Mapping[tuple[str, str], tuple[Sequence[float], float]]) -> dict[str, float]:
    """Recalls and median ranks under their names in the table."""
    scores: dict[str, float] = {}
    for (way, kind), (recalls, median) in found.items():
        scores |= {f"{way}_recall_at_{top}{kind}": recall for top, recall in zip(TOPS, recalls, strict=True)}
        scores[f"{way}_median_rank{kind}"] = median
    return scores


def hunt(speech: Speech, pairs: Pairs, label: str) -> Hunt | None:
    """The model's vectors; None where it is not grounded or its gallery lacks one of the images."""
    if speech.gallery is None or not set(pairs.names) <= set(speech.gallery.rows):
        return None
    rows = [speech.gallery.rows[name] for name in pairs.names]
    waves, total = read_waves(pairs.utterances), len(pairs.utterances)
    parts: list[Vectors] = []
    with shown_progress(label, "utterances") as report:
        while batch := list(islice(waves, BATCH_UTTERANCES)):
            parts.append(speech.query(batch))
            report(sum(map(len, parts)), total)
    return Hunt(pairs, np.concatenate(parts), speech.gallery.vectors(rows))


def draw_searches(hunt: Hunt, num_examples: int, seed: int) -> list[Search]:
    """Utterances drawn by the seed, and the images that they find first."""
    pairs, total = hunt.pairs, len(hunt.pairs.utterances)
    drawn = np.sort(np.random.default_rng(seed).choice(total, min(num_examples, total), replace=False))
    own_images, _ = pairs.right[""]
    same_words, _ = pairs.right.get("_by_class", pairs.right[""])
    found, scores = first_of(hunt.speech[drawn], hunt.images, [own_images[row] for row in drawn], NUM_SHOWN)
    places = hunt.ranks["speech_to_image", ""].places
    first = first_with_image(pairs.utterances)

    def shown(row: int, image: int, place: int, score: float) -> Shown:
        utterance = first[pairs.names[image]]
        mark: Literal["right", "same words", ""] = "same words" if image in same_words[row] else ""
        mark = "right" if image == pairs.owners[row] else mark
        return Shown(pairs.names[image], utterance.text, thumbnail(utterance, PICTURE_SIDE, "PNG"), place, score, mark)

    searches = []
    chosen = [pairs.utterances[row] for row in drawn]
    for row, one, wave, images, reached in zip(
        drawn.tolist(), chosen, read_waves(chosen), found.tolist(), scores.tolist(), strict=True
    ):
        listed = [shown(row, image, 1 + rank, reached[rank]) for rank, image in enumerate(images)]
        image = int(pairs.owners[row])
        own = shown(row, image, int(places[row]), float(hunt.speech[row] @ hunt.images[image]))
        searches.append(Search(one.id, one.text, wave, listed, own, len(pairs.names)))
    return searches
