"""Phones before and after LASER: the error of a CTC probe on the frozen encoder, and ABX, for a sweep of settings.

    make speech                     # or any corpus with phones, and an encoder: ours, or a transformers directory
    OMP_NUM_THREADS=1 python benchmarks/alignment.py --jobs 2 --source speechocean \
        --corpus artifacts/speech/corpus --encoder artifacts/speech/encoder
    … --arms laser score --seeds 0                # some rows
    … --sweep other.yaml                          # rows of one's own: name: {settings of the section align}

Each arm is `sonorant align` with other settings, once a seed; the probe has the same seed and budget before and after,
and is SUPERB's: what is not, evaluation.probes.recognition says. Settings are chosen by the dev speakers; the test
speakers' errors stand beside. ABX is across and within speakers, any context, of the last layer, and of the one that
is best on dev. The last columns are of the step's journal: how alike frames became (mean cosine) and over how many
directions they are spread (effective rank). What is done is not repeated. The last line is one JSON object, each arm's
error on test over that before.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sonorant.data.corpus import Utterance
    from sonorant.inference import Frames

ROOT = Path(__file__).resolve().parents[1]
PROBE = {"num_updates": 1_500, "learning_rate": 3e-3, "batch_frames": 1_500, "evaluate_every": 100}
"""On speechocean's dev speakers the error falls for 1,000 updates, then rises."""
BASE: dict[str, Any] = {
    "num_updates": 300,
    "phases": [{"weights": {"alignment": 1.0}}],
    "num_trained_layers": 1,
    "optim": {"learning_rate": 2e-4, "beta2": 0.999, "eps": 1e-8, "warmup_share": 0.2, "decay_share": 0.8}
    | {"start_scale": 0.0, "decay": "linear", "final_scale": 0.0, "max_grad_norm": 1.0},
    "batching": {"batch_seconds": 24.0, "crop_seconds": 25.0},
    "precision": "float32",
    "log_every": 25,
}
"""What all arms have unless they say otherwise: LASER's schedule for a small corpus, about 8 pairs an update."""
LASER = {"divergence": 1.0, "divergence_per_frame": 0.0, "repulsion": 0.4, "repulsion_relative": 0.0, "margin": 1.1}
SCORE = {"partner": "frozen", "divergence_per_frame": 1.0, "repulsion_relative": 0.0}
ARMS: dict[str, dict[str, Any]] = {
    "laser": {"alignment": LASER, "optim": {"learning_rate": 2e-5}},
    "laser, lr 2e-4": {"alignment": LASER},
    "relative, lr 2e-5": {"optim": {"learning_rate": 2e-5}},
    "relative": {},
    "relative, lr 1e-3": {"optim": {"learning_rate": 1e-3}},
    "relative, α 2": {"alignment": {"repulsion_relative": 2.0}},
    "relative, 2 layers": {"num_trained_layers": 2},
    "relative, all layers": {"num_trained_layers": None},
    "score, lr 2e-5": {"alignment": SCORE, "optim": {"learning_rate": 2e-5}},
    "score": {"alignment": SCORE},
    "score, lr 1e-3": {"alignment": SCORE, "optim": {"learning_rate": 1e-3}},
    "score, 2 layers": {"alignment": SCORE, "num_trained_layers": 2},
}
BEFORE = "before"


@dataclass(frozen=True)
class Study:
    """What all runs share."""

    corpus: Path
    encoder: Path
    source: str | None
    root: Path
    probe: dict[str, Any]


Job = tuple[Study, str, dict[str, Any] | None, int]
"""A study, an arm, its settings (None: the encoder as it is) and a seed."""


def main() -> None:
    """Make all runs that are missing and print the table and the JSON line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--corpus", type=Path, required=True, help="with phones in every split")
    parser.add_argument("--encoder", type=Path, required=True, help="of ours, or a transformers HuBERT or WavLM")
    parser.add_argument("--source", help="of the corpus, what is measured; all of it is trained on. Default: all")
    parser.add_argument("--root", type=Path, default=ROOT / "build" / "alignment", help="where runs are kept")
    parser.add_argument("--sweep", type=Path, help="a YAML file of arms in place of the built-in ones")
    parser.add_argument("--arms", nargs="+", help="of the sweep; default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--num-updates", type=int, help="of align, for arms that do not say")
    parser.add_argument("--probe-updates", type=int, default=PROBE["num_updates"])
    parser.add_argument("--raw", action="store_true", help="the probe reads states as they are, as SUPERB has it")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    options = parser.parse_args()
    sweep = read_sweep(options.sweep) if options.sweep else ARMS
    if unknown := set(options.arms or ()) - set(sweep):
        parser.error(f"--arms: found {sorted(unknown)}, wanted some of {list(sweep)}: choose among these")
    base = {**BASE, **({"num_updates": options.num_updates} if options.num_updates else {})}
    arms: dict[str, dict[str, Any] | None] = {BEFORE: None}
    arms |= {name: merged(base, sweep[name]) for name in options.arms or sweep}
    probe = {**PROBE, "num_updates": options.probe_updates, "is_standardised": not options.raw}
    study = Study(options.corpus, options.encoder, options.source, options.root, probe)
    # Interleaved: a sweep that is cut short has every arm's first seed.
    jobs: list[Job] = [(study, name, values, seed) for seed in options.seeds for name, values in arms.items()]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in arms}
    with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
        for (_, name, _, seed), measured in zip(jobs, pool.imap(run, jobs), strict=True):
            found[name].append(measured)
            print(
                f"seed {seed}, {name}: PER dev {measured['per_dev']:.2%}, test {measured['per_test']:.2%}", flush=True
            )
    show(study, found, options.seeds)


def read_sweep(path: Path) -> dict[str, dict[str, Any]]:
    """Arms by name; ValueError where the file holds none."""
    import yaml

    sweep = yaml.safe_load(path.read_text())
    if not isinstance(sweep, dict) or not all(isinstance(values, dict) for values in sweep.values()):
        raise ValueError(f"{path}: found no arms, wanted a mapping from names to settings of align: write one")
    return sweep


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Settings with some changed, key by key."""
    return {
        **base,
        **{
            key: merged(base[key], value) if isinstance(value, dict) and isinstance(base.get(key), dict) else value
            for key, value in changes.items()
        },
    }


# ------------------------------------------------------------------------------------------------------- one run


def run(job: Job) -> dict[str, Any]:
    """Train an arm with a seed, unless that is done, and measure it."""
    from sonorant.artifacts import read_record

    study, name, values, seed = job
    digests = [read_record(study.corpus, "corpus")["digest"], read_record(study.encoder, "encoder")["digest"]]
    asked = json.dumps([digests, study.source, study.probe, values, seed], sort_keys=True)
    folder = (
        study.root
        / f"{name.replace(', ', '-').replace(' ', '_')}-{seed}-{hashlib.sha256(asked.encode()).hexdigest()[:8]}"
    )
    result = folder / "result.json"
    if not result.is_file():
        encoder, watched = study.encoder, {}
        if values is not None:
            from sonorant.steps import align

            os.environ["SONORANT_RUNS"] = str(study.root / "scratch")
            settings = {**values, "seed": seed, "checkpoint_every": values["num_updates"]}
            align(settings, corpus=study.corpus, encoder=study.encoder, aligned=folder / "aligned")
            encoder = folder / "aligned"
            watched = last_of(encoder / "journal.jsonl")
        folder.mkdir(parents=True, exist_ok=True)
        measured = {**measure(study, encoder, seed), **watched}
        draft = result.with_suffix(".draft")
        draft.write_text(json.dumps(measured, indent=1) + "\n")
        draft.replace(result)
    found: dict[str, Any] = json.loads(result.read_text())
    return found


def last_of(journal: Path) -> dict[str, float]:
    """What training watched for collapse, in its last entry."""
    entry = json.loads(journal.read_text().splitlines()[-1])
    return {key: entry[f"alignment/{key}"] for key in ("mean_cosine", "effective_rank")}


def measure(study: Study, encoder: Path, seed: int) -> dict[str, Any]:
    """Phone error rates, and every layer's ABX errors from 1 on."""
    import numpy as np

    from sonorant.data.corpus import read_corpus, read_waves
    from sonorant.evaluation.errors import without_silence
    from sonorant.evaluation.probes.fitting import Budget
    from sonorant.evaluation.probes.recognition import Spoken, fit_recogniser
    from sonorant.inference import load_trained

    speech = load_trained(encoder)
    layers = range(speech.num_layers + 1)
    spoken: dict[str, list[Spoken]] = {}
    found: dict[str, Any] = {}
    for split in ("train", "dev", "test"):
        utterances = [u for u in read_corpus(study.corpus, split=split, source=study.source) if u.phones]
        states = speech.states(list(read_waves(utterances)), layers)
        spoken[split] = [
            Spoken(np.stack(frames), tuple(without_silence([label for label, _, _ in u.phones or ()])))
            for u, frames in zip(utterances, states, strict=True)
        ]
        if split != "train":
            found |= {f"abx_{speaker}_{split}": abx(utterances, states, speaker) for speaker in ("across", "within")}
    recogniser = fit_recogniser(spoken["train"], spoken["dev"], Budget(**study.probe, seed=seed))
    return {
        "per_dev": recogniser.dev_error,
        "per_test": recogniser.error(spoken["test"]),
        "probe_update": recogniser.update,
        "probe_weights": recogniser.head.mix.shares.tolist(),
        **found,
    }


def abx(utterances: list[Utterance], states: list[list[Frames]], speaker: Any) -> list[float]:
    """Of phones in any context, the error of each layer from 1 on."""
    from sonorant.evaluation.abx import score_abx
    from sonorant.evaluation.abx.items import phone_items

    items = [item for u in utterances for item in phone_items(u.id, u.speaker, u.phones or ())]
    errors = []
    for layer in range(1, len(states[0])):
        features = {u.id: frames[layer] for u, frames in zip(utterances, states, strict=True)}
        errors.append(score_abx(items, features, speaker=speaker, context="any").error)
    return errors


# ----------------------------------------------------------------------------------------------------- the table


def show(study: Study, found: dict[str, list[dict[str, Any]]], seeds: list[int]) -> None:
    """Print every arm's means, the changes of each seed against itself, what is best on dev, and the JSON line."""
    print(
        f"\n{study.encoder}: {len(seeds)} seeds; means ± standard deviation; in percent. "
        "Change: PER on test against the same probe before\n"
        f"{'':24}{'PER dev':>14}{'PER test':>14}{'change':>16}{'ABX across':>12}{'within':>8}{'best across':>13}"
        f"{'within':>8}{'cosine':>8}{'rank':>7}"
    )
    changes: dict[str, float] = {}
    for name, runs in found.items():
        relative = [one["per_test"] / old["per_test"] - 1 for one, old in zip(runs, found[BEFORE], strict=True)]
        changes[name] = statistics.mean(relative)
        errors = [
            statistics.mean(last_and_best(one, speaker)[i] for one in runs)
            for i in (0, 1)
            for speaker in ("across", "within")
        ]
        watched = [
            statistics.mean(one.get(key, float("nan")) for one in runs) for key in ("mean_cosine", "effective_rank")
        ]
        print(
            f"{name:24}{spread([one['per_dev'] for one in runs])}{spread([one['per_test'] for one in runs])}"
            f"{spread(relative, signed=True):>16}{errors[0]:>12.1%}{errors[1]:>8.1%}{errors[2]:>13.1%}{errors[3]:>8.1%}"
            f"{watched[0]:>8.2f}{watched[1]:>7.1f}"
        )
    arms = [name for name in found if name != BEFORE]
    best = min(arms, key=lambda name: statistics.mean(one["per_dev"] for one in found[name]))
    print(f"lowest on dev: {best}: {changes[best]:+.1%} on test")
    ratios = {name: round(1 + changes[name], 4) for name in arms}
    print(json.dumps({"benchmark": "alignment", "seeds": seeds, "best_on_dev": best, "ratios": ratios}))


def last_and_best(measured: dict[str, Any], speaker: str) -> tuple[float, float]:
    """ABX errors on test of the last layer, and of that which is best on dev."""
    dev, test = measured[f"abx_{speaker}_dev"], measured[f"abx_{speaker}_test"]
    return test[-1], test[dev.index(min(dev))]


def spread(values: list[float], *, signed: bool = False) -> str:
    """Mean ± standard deviation, in percent."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{100 * statistics.mean(values):{'+' if signed else ''}8.1f} ± {100 * deviation:3.1f}"


if __name__ == "__main__":
    main()
