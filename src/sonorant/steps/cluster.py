"""The step `cluster`."""

from __future__ import annotations

from sonorant.config import ClusterConfig
from sonorant.steps.step import In, Metrics, Out, Scratch, step


@step
def cluster(config: ClusterConfig, *, corpus: In, units: Out, scratch: Scratch, encoder: In | None = None) -> Metrics:
    """Assign one of `num_units` k-means units to every frame.

    The units are fitted on frames of the train split alone. Perplexity and dead units are those of its
    labels, inertia is that of the fitted frames.
    """
    from collections.abc import Iterator, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from sonorant.clustering import perplexity
    from sonorant.data.corpus import Utterance, read_corpus
    from sonorant.data.mfcc import NUM_DIMS
    from sonorant.data.progress import shown_progress
    from sonorant.data.units import write_units
    from sonorant.inference import load_trained
    from sonorant.steps.features import (
        draw_utterances,
        fit_once,
        frame_features,
        grow_rows,
        slices_of,
        split_shards,
    )

    speech = None if encoder is None else load_trained(encoder)
    features = frame_features(config, speech)
    utterances = read_corpus(corpus)
    training = [utterance for utterance in utterances if utterance.split == "train"]
    drawn = draw_utterances(training, config.max_frames, config.seed)

    with shown_progress("cluster: features", "seconds of audio") as report:
        width = (NUM_DIMS if speech is None else speech.dim) * (2 * config.context_frames + 1)
        path = scratch / "features.f32"
        frames = grow_rows(path, split_shards(drawn), features, width, np.float32, report)
    codebook, inertia = fit_once(frames, config, scratch)
    stored = slices_of(drawn)

    def labels(shard: Sequence[Utterance]) -> Iterator[NDArray[np.int64]]:
        rest = features([utterance for utterance in shard if utterance.id not in stored])
        for utterance in shard:
            rows = stored.get(utterance.id)
            yield codebook.assign(next(rest) if rows is None else frames[rows])

    with shown_progress("cluster: units", "seconds of audio") as report:
        path = scratch / "units.i16"
        tokens = grow_rows(path, split_shards(utterances), labels, 1, np.int16, report)[:, 0]
    where = slices_of(utterances)
    write_units(
        units,
        ((utterance.id, utterance.num_samples, tokens[where[utterance.id]]) for utterance in utterances),
        config.num_units,
        layer=config.layer,
        normalise=config.normalise,
        context_frames=config.context_frames,
    )
    codebook.save(units / "codebook.safetensors")
    counts = np.zeros(config.num_units, np.int64)
    for utterance in training:
        counts += np.bincount(tokens[where[utterance.id]], minlength=config.num_units)
    return {
        "inertia": inertia,
        "perplexity": perplexity(counts),
        "dead_units": float((counts == 0).sum()),
        "fitted_frames": float(len(frames)),
        "num_frames": float(len(tokens)),
    }
