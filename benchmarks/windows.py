"""What windows cost: frames and units of long recordings in windows, and of a stream, beside one unwindowed pass.

    OMP_NUM_THREADS=1 python benchmarks/windows.py long --model artifacts/model --corpus artifacts/corpus
    OMP_NUM_THREADS=1 python benchmarks/windows.py stream --encoder runs/objectives/encoders/hubert.updates.0 \
        --audio ../shared/data/timit_sample/audio

A recording is made of a corpus's test utterances, or of a folder's audio files, end to end. An encoder without a
codebook gets one of 100 units of its middle layer, fitted on the files that no recording is made of. Differences are
relative to the frames' spread about their mean. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sonorant.clustering import fit_kmeans
from sonorant.data.corpus import read_corpus
from sonorant.data.frames import FRAME_RATE, SAMPLE_RATE, num_frames
from sonorant.data.windows import Cut
from sonorant.inference import Speech, load, load_trained, load_untrained, read_wave
from sonorant.models.codebook import centre_frames

Wave = NDArray[np.float32]
BINS = ((0, 0.2), (0.2, 1), (1, 2), (2, 5), (5, 30))  # s from the nearest border between windows


def frames_of(seconds: float) -> int:
    return round(seconds * FRAME_RATE)


def joined(waves: list[Wave], seconds: float, count: int) -> tuple[list[Wave], list[Wave]]:
    """Recordings of so many seconds, and the waves that are left."""
    recordings, rest = [], list(waves)
    for _ in range(count):
        parts: list[Wave] = []
        while rest and sum(map(len, parts)) < seconds * SAMPLE_RATE:
            parts.append(rest.pop(0))
        recordings.append(np.concatenate(parts)[: round(seconds * SAMPLE_RATE)])
    return recordings, rest


def with_codebook(speech: Speech, waves: list[Wave]) -> Speech:
    layer = speech.num_layers * 2 // 3
    frames = [centre_frames(part) for part in speech.embed(waves, layer)]
    fit = fit_kmeans(np.concatenate(frames), 100, num_restarts=1, seed=0, normalise=False)
    codebook = type(fit.codebook)(fit.codebook.centroids, fit.codebook.shift, fit.codebook.scale, centred=True)
    return Speech(speech.encoder, layer, codebook, speech.about)


def measure_long(speech: Speech, recordings: list[Wave], contexts: list[float], steps: list[float]) -> list[Any]:
    rows = []
    whole = [(speech.embed([wave])[0], speech.units([wave])[0]) for wave in recordings]
    print(f"{'step':>6}{'context':>9}{'all: L2':>10}{'units':>8}   L2 and units by distance to a border, {BINS}")
    for step, context in itertools.product(steps, contexts):
        cut = Cut(frames_of(step), frames_of(context), frames_of(context))
        errors, spreads, same, distances = [], [], [], []
        for wave, (frames, units) in zip(recordings, whole, strict=True):
            errors.append(((speech.embed_long(wave, cut=cut) - frames) ** 2).sum(1))
            spreads.append(((frames - frames.mean(0)) ** 2).sum(1))
            same.append(speech.units_long(wave, cut) == units)
            borders = np.array([w.frames.start for w in cut.windows(len(wave))][1:])
            places = np.arange(len(frames)) + 0.5
            distances.append(np.abs(places[:, None] - borders).min(1) / FRAME_RATE)
        error, spread, agree, distance = map(np.concatenate, (errors, spreads, same, distances))
        row: dict[str, Any] = {"step": step, "context": context, "bins": []}
        for low, high in ((0, np.inf), *BINS):
            here = (low <= distance) & (distance < high)
            if here.any():
                of = (float(np.sqrt(error[here].sum() / spread[here].sum())), float(agree[here].mean()))
                row["bins"].append(of)
        rows.append(row)
        shown = "  ".join(f"{l2:.4f} {units:.3f}" for l2, units in row["bins"][1:])
        print(f"{step:6g}{context:9g}{row['bins'][0][0]:10.4f}{row['bins'][0][1]:8.3f}   {shown}", flush=True)
    return rows


def measure_stream(speech: Speech, recordings: list[Wave], cuts: list[tuple[float, float, float]]) -> list[Any]:
    rows, offline, start = [], [speech.units([wave])[0] for wave in recordings], time.process_time()
    for wave in recordings:
        speech.units([wave])
    seconds = sum(map(len, recordings)) / SAMPLE_RATE
    alone = (time.process_time() - start) / seconds
    print(f"offline: {alone:.4f} CPU seconds a second of audio")
    names = f"{'step':>6}{'after':>7}{'before':>8}{'units':>8}{'first 2 s':>11}{'from 10 s':>11}"
    print(f"{names}{'cost':>7}{'look-ahead':>12}")
    for step, after, before in cuts:
        cut = Cut(frames_of(step), frames_of(before), frames_of(after))
        start = time.process_time()
        found = [speech.stream_units(wave, cut) for wave in recordings]
        cost = (time.process_time() - start) / seconds / alone
        same = [a == b for a, b in zip(found, offline, strict=True)]
        early = float(np.concatenate([s[:100] for s in same]).mean())
        late = np.concatenate([s[500:] for s in same])
        row = {"step": step, "after": after, "before": before, "units": float(np.concatenate(same).mean()),
               "first": early, "late": float(late.mean()) if len(late) else None, "cost": cost}  # fmt: skip
        rows.append(row)
        print(
            f"{step:6g}{after:7g}{before:8g}{row['units']:8.3f}{early:11.3f}{late.mean() if len(late) else -1:11.3f}"
            f"{cost:7.1f}{step + after:12.2f}", flush=True,
        )  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("long", "stream"))
    parser.add_argument("--model", type=Path)
    parser.add_argument("--encoder", type=Path)
    parser.add_argument("--untrained", type=Path)
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--audio", type=Path)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--count", type=int, default=2)
    parser.add_argument("--contexts", type=float, nargs="*", default=[0, 1, 2, 5])
    parser.add_argument("--steps", type=float, nargs="*", default=[20])
    given = parser.parse_args()
    if given.corpus:
        waves = [u.wave() for u in read_corpus(given.corpus, split="test")]
    else:
        waves = [read_wave(path) for path in sorted(given.audio.rglob("*.flac"))]
    seconds = given.seconds or (120 if given.what == "long" else 20)
    recordings, rest = joined(waves, seconds, given.count)
    if given.model:
        speech = load(given.model)
    else:
        opened = load_trained(given.encoder) if given.encoder else load_untrained(given.untrained)
        speech = with_codebook(opened, rest)
    print(f"{len(recordings)} recordings of {num_frames(len(recordings[0])) / FRAME_RATE:g} s, layer {speech.layer} of "
          f"{speech.num_layers}, centred {speech.codebook is not None and speech.codebook.centred}")  # fmt: skip
    if given.what == "long":
        rows = measure_long(speech, recordings, given.contexts, given.steps)
    else:
        choices = [
            *((0.32, 0.48, before) for before in (1, 2, 4, 8)),
            *((0.32, after, 4) for after in (0, 0.16, 0.32, 0.64, 0.96)),
            *((step, 0.48, 4) for step in (0.16, 0.64)),
        ]
        rows = measure_stream(speech, recordings, choices)
    print(json.dumps({"what": given.what, "rows": rows}))


if __name__ == "__main__":
    main()
