"""The step `publish`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sonorant.artifacts import read_record
from sonorant.config import PublishConfig
from sonorant.steps.step import In, Metrics, Out, library_versions, step

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from sonorant.clustering import Fit
    from sonorant.data.corpus import Utterance
    from sonorant.inference import Gallery, Speech
    from sonorant.models.codebook import Codebook
    from sonorant.models.grounding import Grounder

SELECTION_FRAMES = 40_000
AGREEMENT_FRAMES = 10_000


@step
def publish(config: PublishConfig, *, corpus: In, encoder: In, model: Out) -> Metrics:
    """Choose a layer, fit its codebook, and write one folder that serves, measures and opens in transformers."""
    import json
    import shutil

    from sonorant.clustering import perplexity
    from sonorant.data.corpus import read_corpus
    from sonorant.inference import load_trained
    from sonorant.models.grounding import load_grounder, save_grounder
    from sonorant.models.huggingface import save_encoder
    from sonorant.models.reduced import TOLERANCES
    from sonorant.steps.features import draw_utterances

    speech = load_trained(encoder, config.network)
    grounder = load_grounder(encoder, with_images=True)
    if grounder is not None and config.network != "student":
        raise ValueError(
            f"publish.network: found {config.network} for an encoder that was grounded, wanted student: it is the "
            "student's speech that images were compared to"
        )
    utterances = read_corpus(corpus)
    train = draw_utterances([u for u in utterances if u.split == "train"], config.max_frames, config.seed)
    layer, scores = config.layer, dict[int, float]()
    if layer is None:
        layer, scores = choose_layer(config, speech, train, [u for u in utterances if u.split == "dev"])
    fit = fit_units(config, [states[0] for states in states_of(speech, train, [layer])], config.num_restarts)
    metrics = {
        "layer": float(layer),
        "inertia": float(fit.inertia),
        "perplexity": perplexity(fit.counts),
        "dead_units": float((fit.counts == 0).sum()),
        **{f"dev_pnmi/layer_{number}": score for number, score in scores.items()},
    }
    heard = [u for u in utterances if u.split == "dev"] or train
    agreement = {
        precision: agreement_of(precision, speech, layer, fit.codebook, heard, config.seed) for precision in TOLERANCES
    }
    metrics |= {f"{precision}_agreement": share for precision, share in agreement.items()}
    gallery = None if grounder is None else gallery_of(grounder, utterances)
    if grounder is not None:
        metrics["images"] = float(0 if gallery is None else len(gallery))
    trained, prepared = read_record(encoder, "encoder"), read_record(corpus, "corpus")
    provenance = {
        "commit": commit(),
        "corpus": {key: prepared[key] for key in ("config", "digest", "metrics")},
        "encoder": {key: trained[key] for key in ("config", "digest", "inputs", "metrics")},
        "libraries": library_versions(),
        "publish": config.model_dump(mode="json"),
        "rounds": sum(made.get("step") == "pretrain" for made in (trained, *trained.get("lineage", {}).values())),
    }
    about = {"layer": layer, "num_units": config.num_units, "agreement": agreement, "provenance": provenance}
    if gallery is not None:
        about["num_images"] = len(gallery)
    save_encoder(speech.encoder, model, **about)
    if grounder is not None:
        grounder.image_side = None  # to search is to hear
        save_grounder(grounder, model)
    if gallery is not None:
        gallery.save(model, thumbnails_of(utterances, config.thumbnail_side))
    fit.codebook.save(model / "codebook.safetensors")
    (model / "provenance.json").write_text(json.dumps(provenance, indent=1, sort_keys=True) + "\n")
    (model / "README.md").write_text(model_card(config, speech, layer, provenance, metrics, gallery))
    if (encoder / "journal.jsonl").is_file():  # one that transformers wrote has none
        shutil.copy(encoder / "journal.jsonl", model / "journal.jsonl")
    return metrics


def states_of(speech: Speech, utterances: Sequence[Utterance], layers: Sequence[int]) -> Iterator[list[Any]]:
    """The frames of some layers, utterance by utterance, a few in memory at a time."""
    from sonorant.data.corpus import read_waves

    for start in range(0, len(utterances), 16):
        yield from speech.states(list(read_waves(utterances[start : start + 16])), layers)


def fit_units(config: PublishConfig, frames: Sequence[Any], num_restarts: int) -> Fit:
    """Fit the codebook on utterances' frames, (T, D) each."""
    from dataclasses import replace

    import numpy as np

    from sonorant.clustering import fit_kmeans
    from sonorant.models.codebook import centre_frames

    centred = config.normalise == "utterance_mean"
    fit = fit_kmeans(
        np.concatenate([centre_frames(part) for part in frames] if centred else list(frames)),
        config.num_units,
        num_restarts=num_restarts,
        seed=config.seed,
        normalise=config.normalise == "corpus",
    )
    return replace(fit, codebook=replace(fit.codebook, centred=centred))


def agreement_of(
    precision: str, speech: Speech, layer: int, codebook: Codebook, utterances: Sequence[Utterance], seed: int
) -> float:
    """The share of units that stay the same when the encoder hears at that precision: what serving at it costs."""
    import numpy as np

    from sonorant.data.corpus import read_waves
    from sonorant.models.reduced import at_precision
    from sonorant.steps.features import draw_utterances

    waves = list(read_waves(draw_utterances(utterances, AGREEMENT_FRAMES, seed)))
    reduced = type(speech)(at_precision(speech.encoder, precision), layer)
    pairs = zip(speech.embed(waves, layer), reduced.embed(waves, layer), strict=True)
    return float(np.mean(np.concatenate([codebook.assign(a) == codebook.assign(b) for a, b in pairs])))


def gallery_of(grounder: Grounder, utterances: Sequence[Utterance]) -> Gallery | None:
    """Every image of the utterances with its vector and what is said of it, None where there are none."""
    import numpy as np
    import torch

    from sonorant.data.progress import shown_progress
    from sonorant.inference import Gallery, Picture
    from sonorant.steps.pictures import open_pictures, parts_of

    pictures = open_pictures(utterances, grounder.config.image)
    if not len(pictures):
        return None
    vectors = np.empty((len(pictures), grounder.config.dim), np.float32)
    with torch.inference_mode(), shown_progress("publish", "images") as report:
        for rows, part in parts_of(pictures):
            vectors[rows] = grounder.image(part).numpy()
            report(rows.stop, len(pictures))
    if not np.isfinite(vectors).all():
        raise ValueError(
            "publish: found vectors of images that are not finite, wanted finite ones: ground with a lower "
            "ground.optim.learning_rate"
        )
    texts: dict[str, dict[str, None]] = {name: {} for name in pictures.names}
    for utterance in utterances:
        if utterance.image is not None and utterance.text:
            texts[utterance.image.name][utterance.text] = None
    about = zip(pictures.names, pictures.of, strict=True)
    return Gallery(vectors, [Picture(name, first.split, tuple(texts[name])) for name, first in about])


def thumbnails_of(utterances: Sequence[Utterance], side: int) -> list[bytes | None] | None:
    """A JPEG of each image, at most `side` pixels wide and high, in the gallery's order; None where none is wanted.

    Regions that a detector found have no picture.
    """
    from sonorant.data.pairs import first_with_image, thumbnail

    if not side:
        return None
    return [thumbnail(utterance, side, "JPEG") for _, utterance in sorted(first_with_image(utterances).items())]


def choose_layer(
    config: PublishConfig, speech: Speech, train: Sequence[Utterance], dev: Sequence[Utterance]
) -> tuple[int, dict[int, float]]:
    """The layer whose units tell most about the dev utterances' phones (PNMI without silence), and every layer's score.

    Without phones the layer two thirds up is taken and there are no scores.
    """
    from sonorant.data.frames import frame_labels
    from sonorant.evaluation.units import Joint
    from sonorant.steps.features import draw_utterances

    labelled = [u for u in dev if u.phones is not None]
    if not labelled:
        layer = round(2 * speech.num_layers / 3)
        print(f"publish: dev has no phones: layer {layer} of {speech.num_layers} is taken unmeasured", flush=True)
        return layer, {}
    layers = range(1, speech.num_layers + 1)
    labelled = draw_utterances(labelled, SELECTION_FRAMES, config.seed)
    fitted = list(states_of(speech, draw_utterances(train, SELECTION_FRAMES, config.seed), layers))
    measured = list(states_of(speech, labelled, layers))
    phones = [frame_labels(u.phones or (), u.num_frames) for u in labelled]
    scores = {}
    for place, layer in enumerate(layers):
        codebook = fit_units(config, [states[place] for states in fitted], num_restarts=1).codebook
        units = [codebook.assign(states[place]) for states in measured]
        scores[layer] = Joint.of_frames(phones, units, codebook.num_units).without("SIL").pnmi
        print(f"publish: layer {layer} of {speech.num_layers}, dev PNMI {scores[layer]:.4f}", flush=True)
    return max(scores, key=lambda layer: scores[layer]), scores


def commit() -> str | None:
    """The last commit that changed the library, with a + where its files differ; $SONORANT_COMMIT in an image."""
    import os
    import subprocess

    if given := os.environ.get("SONORANT_COMMIT"):
        return given
    package = Path(__file__).resolve().parents[1]

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", package, *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        last, changed = git("log", "-1", "--format=%H", "--", "."), git("status", "--porcelain", "--", ".")
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{last}+" if changed else last or None


def recipe_of(config: PublishConfig, provenance: dict[str, Any]) -> str:
    """How the encoder was made, in a sentence."""
    trained = provenance["encoder"]
    if not trained["config"]:
        return f"An encoder that transformers wrote, opened as it was: digest `{trained['digest']}`."
    phases = "; ".join(
        f"{phase['share']:.0%} of updates: " + ", ".join(f"{name} {w:g}" for name, w in phase["weights"].items())
        for phase in trained["config"]["phases"]
    )
    return (
        f"Task weights: {phases}. {trained['config']['num_updates']} updates of "
        f"{trained['config']['batching']['batch_seconds']:g} s of audio,\nthe {config.network} network, made by "
        f"sonorant at commit `{provenance['commit']}`. All settings: `provenance.json`."
    )


def searching(gallery: Gallery | None) -> str:
    """How the model finds images, in a section of its card; nothing where it finds none."""
    if gallery is None:
        return ""
    return f"""
## Images

Speech finds what it speaks of among {len(gallery)} images of the data, all splits together: their vectors of
{gallery.dim} dimensions are in `images.faiss`, what is known of each in the same line of `images.jsonl`.

```python
[found] = speech.search([read_wave(Path("a.flac"))], top=5)
[(image.picture.id, image.score) for image in found]
```
"""


def model_card(
    config: PublishConfig,
    speech: Speech,
    layer: int,
    provenance: dict[str, Any],
    metrics: Metrics,
    gallery: Gallery | None,
) -> str:
    """README.md in the Hub's convention: data and licence, recipe, metrics with their command, limits."""
    prepared, trained = provenance["corpus"], provenance["encoder"]
    sources = ", ".join(f"{source['name']} ({source['kind']})" for source in prepared["config"]["sources"])
    rows = "\n".join(f"| {name} | {value:.4g} |" for name, value in {**trained["metrics"], **metrics}.items())
    made = "Trained" if trained["config"] else "Units fitted"
    standardised = """standardised (mean 0, variance 1) over the whole utterance, as `preprocessor_config.json` says and
`load` does; `load` adds 1e-5 to the variance and transformers 1e-7, which differ for speech below about -40 dB of full
scale."""
    recorded = "as they were recorded, 1 being full scale and nothing standardised, as `preprocessor_config.json` says."
    return f"""---
license: {config.licence.split(":")[0]}
library_name: transformers
pipeline_tag: feature-extraction
tags: [speech, self-supervised, speech-units, sonorant]
---

# A speech encoder and its units

Frames of {speech.dim} dimensions every 20 ms from 16 kHz mono speech, and {config.num_units} unit tokens
from layer {layer} of {speech.num_layers}.

```python
from transformers import AutoModel
encoder = AutoModel.from_pretrained("…")             # hidden_states[{layer}] is the published layer

from sonorant.inference import load, read_wave
speech = load(Path("…"))
[units] = speech.units([read_wave(Path("a.flac"))])
```
{searching(gallery)}
## Data

{sources}: {prepared["metrics"].get("hours", float("nan")):.3g} hours, corpus digest `{prepared["digest"]}`.
Licence of the data: {config.licence}.

## Recipe

{recipe_of(config, provenance)}

## Metrics

Last journal entry of `sonorant pretrain`, and what `sonorant publish` measured on the dev split:

| metric | value |
|---|---|
{rows}

Phone discrimination (ABX) and unit quality on the test split: `sonorant evaluate --corpus … --model … --report …`.

## Limits

{made} on the data named above alone: expect worse results on other languages, channels and speakers.
Waveforms must be {standardised if speech.encoder.config.standardised else recorded}
Units are made from whole utterances where the codebook is centred (`publish.normalise: utterance_mean`).
"""
