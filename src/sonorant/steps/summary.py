"""What `evaluate` says at its end: the page, the tables for DVC, the table on the terminal."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sonorant.artifacts import final_place, read_record
from sonorant.config import EvaluateConfig
from sonorant.data.corpus import Utterance, read_waves
from sonorant.evaluation.measures import MEASURES, RETRIEVAL, System, best_systems, measured, show_score
from sonorant.evaluation.report import Example, Report
from sonorant.evaluation.units import Joint, confuse
from sonorant.inference import Speech, load
from sonorant.steps.items import Items
from sonorant.steps.scoring import Scored
from sonorant.steps.searching import draw_searches

if TYPE_CHECKING:
    from rich.console import Console

SYNTHETIC = (
    "The evaluated speech is synthetic: absolute scores on it say little. Read the differences between the "
    "columns, and judge a model on recorded speech."
)


def describe(
    config: EvaluateConfig,
    corpus: Path,
    model: Path,
    scored: Sequence[Scored],
    utterances: Sequence[Utterance],
    items: Items,
    everything: Sequence[Utterance],
    journal: Sequence[Mapping[str, Any]],
) -> Report:
    """The page of one evaluation."""
    chosen = f"split {config.split}" + (f" of {config.source}" if config.source else "")
    speech = load(model)
    title = (
        f"Layer {speech.layer} of {speech.num_layers} and its {speech.num_units} units, "
        f"measured on {len(utterances)} utterances ({chosen})"
    )
    searched = scored[0].hunt
    return Report(
        title=title,
        systems=[one.system for one in scored] + ([searched.chance] if searched else []),
        notes=make_notes(config, corpus, scored, utterances, items, speech),
        journal=journal,
        joint=scored[0].joint,
        examples=draw_examples(config, utterances, speech),
        searches=draw_searches(searched, config.num_examples, config.seed) if searched else [],
        corpus=count_speech(everything),
        refused=json.loads((corpus / "stats.json").read_text())["refused"]["reasons"],
        durations=[utterance.seconds for utterance in utterances],
        provenance=speech.about,
    )


def make_notes(
    config: EvaluateConfig,
    corpus: Path,
    scored: Sequence[Scored],
    utterances: Sequence[Utterance],
    items: Items,
    speech: Speech,
) -> list[str]:
    """What a reader must know before the scores."""
    notes = [SYNTHETIC] if is_synthetic(corpus, utterances) else []
    num_aligned = sum(utterance.phones is not None for utterance in utterances)
    phonetic = f"{'ABX errors, ' if config.items is None else ''}PNMI and purities"
    if not num_aligned:
        notes.append(
            f"None of the evaluated utterances has phones: {phonetic} are left out. "
            "Evaluate a source with phone times to have them."
        )
    elif num_aligned < len(utterances):
        notes.append(f"{phonetic} are of the {num_aligned} utterances of {len(utterances)} that have phones.")
    notes += items.notes
    missing = [name for name in scored[0].missing if name not in scored[0].system.scores]
    if missing:
        names = {measure.key: measure.name for group in MEASURES.values() for measure in group}
        listed = "; ".join(names[name] for name in missing)
        notes.append(f"Too little speech for these ABX errors, which are left out: {listed}.")
    return notes + note_retrieval(scored, utterances, speech.gallery is not None)


def note_retrieval(scored: Sequence[Scored], utterances: Sequence[Utterance], has_gallery: bool) -> list[str]:
    """What could not be measured of retrieval, where it could be expected."""
    num_with_image = sum(utterance.image is not None for utterance in utterances)
    hunt = scored[0].hunt
    if hunt is None:
        if has_gallery:
            found = f"of their images, {num_with_image}, none is" if num_with_image else "they have no images"
            return [
                f"Retrieval is left out: {found} in the model's gallery. Evaluate the corpus that the model was "
                "published with, on a source with images."
            ]
        if not num_with_image:
            return []
        return [
            f"Retrieval is left out: {num_with_image} of the evaluated utterances have an image, but the model has no "
            "gallery. Run `sonorant ground` and publish what it writes."
        ]
    notes = []
    num_searched = len(hunt.pairs.utterances)
    if num_searched < len(utterances):
        notes.append(
            f"Retrieval is of the {num_searched} utterances of {len(utterances)} whose image is in the model's gallery."
        )
    if hunt.pairs.words is None:
        notes.append("Retrieval of the same words is left out: some of these utterances have no text.")
    if any(one.system.key == "previous" and one.hunt is None for one in scored):
        notes.append(
            "The previous model has no gallery, or one that lacks some of the images: it has no scores of retrieval."
        )
    return notes


def is_synthetic(corpus: Path, utterances: Sequence[Utterance]) -> bool:
    """Whether any of the utterances comes from the built-in corpus."""
    sources = read_record(corpus, "corpus")["config"].get("sources", [])
    synthetic = {source["name"] for source in sources if source["kind"] == "synthetic"}
    return any(utterance.source in synthetic for utterance in utterances)


def draw_examples(config: EvaluateConfig, utterances: Sequence[Utterance], speech: Speech) -> list[Example]:
    """Utterances drawn by the seed, those with phones first."""
    candidates = [u for u in utterances if u.phones is not None] or list(utterances)
    rng = np.random.default_rng(config.seed)
    rows = rng.choice(len(candidates), min(config.num_examples, len(candidates)), replace=False)
    drawn = [candidates[row] for row in sorted(rows.tolist())]
    waves = list(read_waves(drawn))
    units = speech.units(waves)
    return [Example(u.id, w, z, u.phones, u.text) for u, w, z in zip(drawn, waves, units, strict=True)]


def count_speech(everything: Sequence[Utterance]) -> list[dict[str, str | int | float]]:
    """A row for each source and split of the corpus."""
    rows: list[dict[str, str | int | float]] = []
    for source, split in sorted({(u.source, u.split) for u in everything}):
        own = [u for u in everything if (u.source, u.split) == (source, split)]
        rows.append(
            {
                "source": source,
                "split": split,
                "utterances": len(own),
                "speakers": len({u.speaker for u in own}),
                "minutes": sum(u.seconds for u in own) / 60,
                "with phones": sum(u.phones is not None for u in own),
            }
        )
    return rows


def list_confusions(joint: Joint) -> list[dict[str, str | int | float]]:
    """A row for each phone and what some of its frames are heard as: how many, and which share of the phone's."""
    confusion = confuse(joint)
    shares = confusion.shares
    return [
        {
            "phone": confusion.phones[said],
            "heard_as": confusion.phones[heard],
            "share": float(shares[said, heard]),
            "frames": int(confusion.frames[said, heard]),
        }
        for said, heard in np.argwhere(confusion.frames).tolist()
    ]


def print_table(page: Report, report: Path) -> None:
    """The scores and the page's path, on the terminal and in table.txt."""
    from rich.console import Console

    with (report / "table.txt").open("w") as file:
        for console in (Console(file=sys.stdout), Console(file=file, width=100)):
            show_tables(page.title, page.systems, console)
            for note in page.notes:
                console.print(note, markup=False)
    print(f"report: {final_place(report) / 'report.html'}")


def show_tables(title: str, systems: Sequence[System], console: Console | None = None) -> None:
    """Every score of every system that has any, those of retrieval apart; on the terminal unless told otherwise."""
    from rich.console import Console
    from rich.table import Table

    console = console or Console(file=sys.stdout)
    for heading, all_groups in {title: MEASURES, "Retrieval": RETRIEVAL}.items():
        groups, shown = measured(all_groups, systems)
        if not groups:
            continue
        table = Table(title=heading, title_justify="left", title_style="bold")
        table.add_column("")
        for system in shown:
            table.add_column(system.name, justify="right")
        for group, measures in groups.items():
            table.add_section()
            table.add_row(f"[bold]{group}")
            for measure in measures:
                best = best_systems(measure, shown)
                texts = {s.key: show_score(measure, s.scores.get(measure.key)) for s in shown}
                cells = [f"[bold]{text}" if key in best else text for key, text in texts.items()]
                arrow = {"lower": " ↓", "higher": " ↑", "": ""}[measure.better]
                table.add_row(measure.name + arrow, *cells)
        console.print(table)


def list_shares(systems: Sequence[System]) -> list[dict[str, Any]]:
    """A row for each layer that a probe of a system reads."""
    return [
        {"system": system.key, "probe": probe, "layer": layer, "share": float(share)}
        for system in systems
        for probe, shares in system.shares.items()
        for layer, share in enumerate(shares)
    ]


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows under the union of their keys; a key that a row lacks is left empty."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
