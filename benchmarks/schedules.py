"""The nine schedules of self-supervision and visual grounding, side by side on spoken digits: recall and ABX.

    sonorant prepare --config recipes/runs/digits.yaml --corpus build/schedules/digits
    sonorant cluster --config recipes/runs/digits.yaml --corpus build/schedules/digits --units build/schedules/units
    sonorant prepare --config recipes/runs/speech.yaml --corpus build/schedules/speech
    OMP_NUM_THREADS=1 python benchmarks/schedules.py --jobs 2               # wav2vec 2.0, as in the paper
    OMP_NUM_THREADS=1 python benchmarks/schedules.py --jobs 2 --ssl units   # offline units in its place

Every run starts from nothing, makes the same number of updates and takes from recipes/schedules its phases alone; all
else is recipes/runs/digits.yaml's. Recall@1 is by digit, of test speakers' utterances among test images and back; what
was never grounded finds by chance. ABX is of phones of speakers in another corpus (any context), of the layer that is
best. Runs that are done are not repeated. The last line is one JSON object: a ratio above 1 says that the schedule
finds more than VGS alone.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from sonorant.data.corpus import Utterance

ROOT = Path(__file__).resolve().parents[1]
SCHEDULES = {
    "w2v2": ("W2V2", 0.0, 0.0, 7.05, 9.53),
    "vgs": ("VGS", 28.4, 40.1, 4.82, 6.44),
    "vgs_plus": ("VGS+", 29.0, 40.1, 5.09, 6.81),
    "w2v2_then_vgs_plus": ("(W2V2, VGS+)", 32.0, 44.4, 6.95, 8.72),
    "vgs_then_vgs_plus": ("(VGS, VGS+)", 27.9, 39.3, 5.49, 7.55),
    "w2v2_then_vgs": ("(W2V2, VGS)", 32.3, 44.8, 6.74, 8.75),
    "vgs_then_w2v2": ("(VGS, W2V2)", 0.0, 0.0, 8.40, 11.54),
    "vgs_plus_then_w2v2": ("(VGS+, W2V2)", 14.5, 7.5, 6.23, 8.35),
    "vgs_plus_then_vgs": ("(VGS+, VGS)", 28.8, 39.8, 4.50, 6.02),
}
"""The paper's name, its recall@1 (speech to image, image to speech) and ABX (within, across): grounding.md §1.4 [P]."""
MEASURES = ("speech_to_image", "image_to_speech", "abx_within", "abx_across")
SSL = {
    "contrast": {"contrast": 1.0, "diversity": 0.1, "magnitude": 1.0},
    "units": {"units": 1.0},
}
"""What takes W2V2's place, by the first of its tasks."""


def main() -> None:
    """Make all runs that are missing and print the table and the JSON line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--root", type=Path, default=ROOT / "build" / "schedules", help="corpora in, runs out")
    parser.add_argument("--ssl", choices=SSL, default="contrast", help="what stands for self-supervision")
    parser.add_argument("--num-updates", type=int, default=450)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--schedules", nargs="+", choices=SCHEDULES, default=list(SCHEDULES))
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    given = parser.parse_args()
    # Interleaved: whatever else the machine does falls on all alike.
    jobs = [(given.root, given.ssl, given.num_updates, name, seed) for seed in given.seeds for name in given.schedules]
    with multiprocessing.get_context("spawn").Pool(given.jobs) as pool:
        results = dict(zip(jobs, pool.imap(run, jobs), strict=True))
    titles = ("S→I R@1 %", "I→S R@1 %", "ABX within %", "ABX across %")
    print(f"{'':14} {' '.join(f'{title:>16}' for title in titles)}   the paper's")
    means: dict[str, dict[str, float]] = {}
    for name in given.schedules:
        found = [results[given.root, given.ssl, given.num_updates, name, seed] for seed in given.seeds]
        columns = {measure: [100 * one[measure] for one in found] for measure in MEASURES}
        means[name] = {measure: statistics.mean(values) for measure, values in columns.items()}
        shown = [f"{statistics.mean(v):.1f} ± {statistics.stdev(v) if len(v) > 1 else 0:.1f}" for v in columns.values()]
        title, *paper = SCHEDULES[name]
        print(f"{title:14} {' '.join(f'{text:>16}' for text in shown)}   {' / '.join(map(str, paper))}")
    if "vgs" in means:
        base = means["vgs"]["speech_to_image"]
        ratios = {name: round(values["speech_to_image"] / base, 3) for name, values in means.items() if name != "vgs"}
        about = {"ssl": given.ssl, "num_updates": given.num_updates, "ratios": ratios}
        print(json.dumps({"benchmark": "schedules", **about}))


def run(job: tuple[Path, str, int, str, int]) -> dict[str, float]:
    """Train one schedule with one seed, unless that is done, and measure it."""
    root, ssl, num_updates, name, seed = job
    folder = root / "runs" / f"{ssl}-{num_updates}-{name}-{seed}"
    result = folder / "result.json"
    if not result.is_file():
        from sonorant.steps import ground

        os.environ["SONORANT_RUNS"] = str(root / "runs" / "scratch")
        units = {"units": root / "units"} if ssl == "units" else {}
        ground(values_of(ssl, num_updates, name, seed), corpus=root / "digits", **units, grounded=folder / "grounded")
        measured = {**recalls(folder / "grounded", root / "digits"), **abx(folder / "grounded", root / "speech")}
        result.write_text(json.dumps(measured, indent=1) + "\n")
    found: dict[str, float] = json.loads(result.read_text())
    return found


def values_of(ssl: str, num_updates: int, name: str, seed: int) -> dict[str, Any]:
    """The section `ground` of a run: its schedule's phases, with another objective in W2V2's place if so asked."""
    from sonorant.params import read_params

    files = [ROOT / "recipes" / "runs" / "digits.yaml", ROOT / "recipes" / "schedules" / f"{name}.yaml"]
    params = read_params(files)
    values: dict[str, Any] = {**params["ground"], "encoder": params["pretrain"]["encoder"]}
    for phase in values["phases"]:
        grounding = phase["weights"].get("grounding", 0.0)
        share = 1.0 - grounding
        weights = {task: share * weight for task, weight in SSL[ssl].items()} if share else {}
        phase["weights"] = {**({"grounding": grounding} if grounding else {}), **weights}
    return {**values, "num_updates": num_updates, "seed": seed, "log_every": 50, "checkpoint_every": num_updates}


def recalls(grounded: Path, corpus: Path) -> dict[str, float]:
    """Recall@1 by digit, both ways; by chance where nothing was grounded."""
    import numpy as np

    from sonorant.data.corpus import read_corpus
    from sonorant.evaluation.retrieval import rank, related

    utterances = read_corpus(corpus, split="test")
    texts = sorted({str(utterance.text) for utterance in utterances})
    labels = np.array([texts.index(str(utterance.text)) for utterance in utterances])
    found = vectors_of(grounded, utterances)
    if found is None:
        return {"speech_to_image": 1 / len(texts), "image_to_speech": 1 / len(texts)}
    spoken, seen, owners = found
    images, speech = related(owners, labels, len(seen))
    return {
        "speech_to_image": rank(spoken, seen, images).recall(1),
        "image_to_speech": rank(seen, spoken, speech).recall(1),
    }


def vectors_of(
    grounded: Path, utterances: Sequence[Utterance]
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]] | None:
    """Utterances (S, E), their images (I, E) and which image is whose (S,); None where nothing was grounded."""
    import numpy as np
    import torch

    from sonorant.inference import Speech, load_trained
    from sonorant.models.grounding import load_grounder
    from sonorant.steps.pictures import open_pictures, parts_of

    grounder = load_grounder(grounded, with_images=True)
    if grounder is None:
        return None
    pictures = open_pictures(utterances, grounder.config.image)
    with torch.inference_mode():
        seen = np.concatenate([grounder.image(part).numpy() for _, part in parts_of(pictures)])
    encoder = load_trained(grounded).encoder
    speech = Speech(encoder, grounder.layer, grounder=grounder)
    spoken = speech.query([utterance.wave() for utterance in utterances])
    return spoken, seen, np.array([pictures.number(utterance) for utterance in utterances])


def abx(grounded: Path, corpus: Path) -> dict[str, float]:
    """Of the phones of another corpus's test speakers: the error of the layer that is best at each."""
    from sonorant.data.corpus import read_corpus, read_waves
    from sonorant.evaluation.abx import score_abx
    from sonorant.evaluation.abx.items import phone_items
    from sonorant.inference import load_trained

    utterances = [u for u in read_corpus(corpus, split="test", source="speechocean") if u.phones is not None]
    items = [item for u in utterances for item in phone_items(u.id, u.speaker, u.phones or ())]
    speech = load_trained(grounded)
    layers = range(1, speech.num_layers + 1)
    states = speech.states(list(read_waves(utterances)), layers)
    errors: dict[str, float] = {}
    for speaker in ("within", "across"):
        found = []
        for place in range(len(layers)):
            features = {u.id: frames[place] for u, frames in zip(utterances, states, strict=True)}
            choice = {"speaker": speaker, "context": "any", "slicing": "fixed", "max_items": 10, "max_speakers": 5}
            found.append(score_abx(items, features, **choice, seed=0).error)
        errors[f"abx_{speaker}"] = min(found)
    return errors


if __name__ == "__main__":
    main()
