"""What the objectives are worth side by side: every recipe on real speech with one tiny encoder, in minutes.

    python benchmarks/objectives.py --jobs 2                     # everything; runs that are done are not repeated
    python benchmarks/objectives.py --methods hubert mt4ssl --seeds 0 --num-updates 100

Every run has the encoder, the optimiser and the batches of recipes/runs/objectives.yaml and takes from its recipe the
weights, the masking and the settings of its tasks; what the former says of tasks goes for all. All that counts updates
(warm-up, decay, the teacher's ramp, the quantiser's temperature, when weights are balanced, when the guard wakes) is
stretched to the run's length.

Equal updates: all make the same number. Equal time: as many as fit into the CPU seconds of one thread that hubert's
updates took (the median over seeds of the runs with equal updates); wall time would also measure the neighbours.

Training hears the train speakers alone. The layer, 0 to the last, is chosen by the PNMI without silence of its units on
dev speakers; PNMI, ABX and the phone probe are of test speakers. Both probes are linear and read all layers side by
side. The speaker probe tells the train speakers apart by an utterance's mean frames, four-fold over utterances.
The last line is one JSON object; a ratio above 1 says that the claim holds.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import json
import math
import multiprocessing
import os
import shutil
import signal
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from sonorant.config import EvaluateConfig
    from sonorant.data.corpus import Utterance
    from sonorant.evaluation.units import Joint
    from sonorant.inference import Speech
    from sonorant.models.codebook import Codebook

    Frames = NDArray[np.float32]

ROOT = Path(__file__).resolve().parents[1]
METHODS = ("hubert", "data2vec", "mt4ssl", "dinosr", "wav2vec2", "mgf", "mt4ssl+codebooks", "dinosr+utterance")
SCALES = {
    "S": ("waveform",),
    "F": ("spectrum",),
    "P": ("contrast",),
    "U": ("utterance",),
    "S+F": ("waveform", "spectrum"),
    "S+F+P": ("waveform", "spectrum", "contrast"),
}
"""MGF's ablations: sample, frame, phoneme and utterance scale alone, then together; all four are mgf itself."""
PUBLISHED_CODES = "dinosr:published"
"""With its recipe's codebooks, whatever the common setting says of them."""
UPDATES, TIME, BASELINE = "updates", "time", "baseline"
"""Conditions of runs: as many updates as all, as many as fit into hubert's time, none."""
BASELINES = ("mfcc", "mfcc_centred", "untrained")
TASK_SECTIONS = (
    "masking", "units", "codebooks", "contrast", "quantiser", "waveform", "spectrum", "utterance", "balance"
)  # fmt: skip
"""What a method's recipe says of its objective, beside its phases."""
COUNTED = (
    ("teacher", "ramp_updates"), ("teacher", "freeze_at"), ("stem", "freeze_at"), ("codebooks", "freeze_at"),
    ("balance", "at"), ("balance", "every"), ("guard", "after_updates"),
)  # fmt: skip
"""Settings that are numbers of updates."""
NUM_JOURNAL_ENTRIES = 20
PROBE_FRAMES = 8_000
PHONE_PENALTY, SPEAKER_PENALTY = 1e-3, 1e-2
SPEAKERS: tuple[Literal["across", "within"], ...] = ("across", "within")
NEARLY_EQUAL = 0.03
"""A run with equal time is that with equal updates where their numbers of updates differ by no more."""
MEASURES = {"pnmi": "PNMI", "abx_across": "ABX across", "abx_within": "ABX within"}
PROBES = {"phone probe": "phone", "speaker probe": "speaker"}
EFFORT = ("num_updates", "cpu_seconds")
SHARES = (0.1, 0.25, 0.5, 0.75, 1.0)
"""Of a run's updates: when the codes are counted."""
Scores = dict[str, float]


@dataclass(frozen=True)
class Run:
    """One training and its scores: which objective, until when, what seed; `config` is its section `pretrain`.

    A baseline is not trained: of its section the encoder's shape alone is read.
    """

    method: str
    condition: str
    seed: int
    config: dict[str, Any]

    @property
    def name(self) -> str:
        """What its files are called."""
        return f"{self.method}.{self.condition}.{self.seed}"


@dataclass(frozen=True)
class Setting:
    """What all runs share: how many units, how they are scored, the digests of the speech and its units."""

    num_units: int
    evaluate: dict[str, Any]
    digests: dict[str, str]


# ------------------------------------------------------------------------------------------------ configurations


def stretched(values: Mapping[str, Any], num_updates: int) -> dict[str, Any]:
    """A section `pretrain` with all that counts updates brought to runs of `num_updates`."""
    ratio = num_updates / values["num_updates"]
    result = {key: dict(value) if isinstance(value, dict) else value for key, value in values.items()}
    for section, key in COUNTED:
        if result.get(section, {}).get(key):
            result[section][key] = max(1, round(ratio * result[section][key]))
    if "temperature_decay" in result.get("quantiser", {}):
        result["quantiser"]["temperature_decay"] **= 1 / ratio
    return {**result, "num_updates": num_updates}


def objective(common: Mapping[str, Any], recipe: Mapping[str, Any], seed: int, num_updates: int) -> dict[str, Any]:
    """The section `pretrain` of one run, stretched to its length: the common setting with a recipe's objective.

    What the common setting says of tasks is laid over all recipes.
    """
    from sonorant.params import merged

    shared, chosen = stretched(common, num_updates), stretched(recipe, num_updates)
    tasks = {key: merged([chosen[key], shared.get(key, {})]) for key in TASK_SECTIONS if key in chosen}
    return {
        **{key: value for key, value in shared.items() if key not in TASK_SECTIONS},
        **tasks,
        "phases": chosen["phases"],
        "seed": seed,
        "log_every": max(1, num_updates // NUM_JOURNAL_ENTRIES),
        "checkpoint_every": num_updates,
    }


def only(recipe: Mapping[str, Any], tasks: Sequence[str]) -> dict[str, Any]:
    """A recipe with some of its tasks alone."""
    phases = [
        {**phase, "weights": {name: phase["weights"][name] for name in tasks}} for phase in recipe["phases"]
    ]
    return {**recipe, "phases": phases}


# ------------------------------------------------------------------------------------------------------- one run


def execute(job: tuple[Run, Path, Setting]) -> Run:
    """Train and score one run in this process and write what came of it; what a kill has left is made anew."""
    from sonorant.config import EvaluateConfig

    run, folder, setting = job
    found = identity(run, setting)
    encoder, log = folder / "encoders" / run.name, folder / "logs" / f"{run.name}.txt"
    for path in (result_path(folder, run), log, encoder):
        path.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file, contextlib.redirect_stderr(file), contextlib.redirect_stdout(file):
        try:
            if run.condition != BASELINE:
                found |= train(run, folder, encoder)
            is_centred = run.method != "mfcc"  # as `publish` makes units
            evaluate = EvaluateConfig.model_validate(setting.evaluate)
            found["scores"] = score(embed(run, folder), evaluate, setting.num_units, run.seed, is_centred)
        except ValueError as error:
            # A collapse is a finding.
            found["failed"] = str(error)
    result = result_path(folder, run)
    staged = result.with_suffix(".partial")
    staged.write_text(json.dumps(found, indent=1) + "\n")
    staged.rename(result)
    return run


def identity(run: Run, setting: Setting) -> dict[str, Any]:
    """What a result depends on, as JSON gives it back."""
    values: dict[str, Any] = json.loads(json.dumps({**asdict(run), **asdict(setting)}))
    return values


def result_path(folder: Path, run: Run) -> Path:
    """Where a run's result is written."""
    return folder / "results" / f"{run.name}.json"


def read_result(folder: Path, run: Run, setting: Setting) -> dict[str, Any] | None:
    """A run's result; None where there is none of the same configuration and speech."""
    path = result_path(folder, run)
    if not path.is_file():
        return None
    found: dict[str, Any] = json.loads(path.read_text())
    wanted = identity(run, setting)
    return found if {key: found.get(key) for key in wanted} == wanted else None


def train(run: Run, folder: Path, encoder: Path) -> dict[str, Any]:
    """The seconds that the step `pretrain` took, and its journal."""
    from sonorant.steps import pretrain
    from sonorant.training.journal import read_journal

    for module in ("data.batching", "models.huggingface", "training.loop"):
        importlib.import_module(f"sonorant.{module}")  # so that it is not timed
    scratch = folder / "scratch" / run.name
    shutil.rmtree(scratch, ignore_errors=True)
    cpu, wall = time.process_time(), time.perf_counter()
    pretrain(run.config, corpus=folder / "corpus", units=folder / "units", encoder=encoder, scratch=scratch)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    shutil.rmtree(scratch)
    return {"cpu_seconds": cpu, "wall_seconds": wall, "journal": read_journal(encoder / "journal.jsonl")}


@functools.lru_cache(maxsize=1)
def speech(corpus: Path) -> list[tuple[Utterance, Frames]]:
    """Every utterance with its wave."""
    from sonorant.data.corpus import read_corpus

    return [(utterance, utterance.wave()) for utterance in read_corpus(corpus)]


@dataclass(frozen=True)
class Heard:
    """An utterance as a system hears it: the frames (T, D) of each of its layers."""

    utterance: Utterance
    layers: list[Frames]


def embed(run: Run, folder: Path) -> list[Heard]:
    """All utterances' frames: of MFCC, which are one layer, or of layers 0 to the last of an encoder."""
    from sonorant.data.mfcc import mfcc
    from sonorant.inference import load_trained
    from sonorant.models.codebook import centre_frames

    pairs = speech(folder / "corpus")
    if run.method.startswith("mfcc"):
        frames = [mfcc(wave) for _, wave in pairs]
        layers = [[centre_frames(part) if run.method == "mfcc_centred" else part] for part in frames]
    else:
        is_trained = run.method != "untrained"
        encoder = load_trained(folder / "encoders" / run.name) if is_trained else untrained(run.config, run.seed)
        layers = encoder.states([wave for _, wave in pairs], range(encoder.num_layers + 1))
    return [Heard(utterance, states) for (utterance, _), states in zip(pairs, layers, strict=True)]


def untrained(config: Mapping[str, Any], seed: int) -> Speech:
    """An encoder of the shape that a section `pretrain` says, with random weights."""
    import torch

    from sonorant.config import EncoderConfig
    from sonorant.inference import Speech
    from sonorant.models.encoder import Encoder

    shape = EncoderConfig.model_validate(config["encoder"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Speech(Encoder(shape), shape.num_layers)


# -------------------------------------------------------------------------------------------------------- scores


def score(heard: Sequence[Heard], config: EvaluateConfig, num_units: int, seed: int, centred: bool) -> Scores:
    """Everything that is measured of one system, by name; `seed` is that of its units and of what is drawn."""
    import numpy as np

    from sonorant.evaluation.units import measure_use

    train, dev, test = ([one for one in heard if one.utterance.split == split] for split in ("train", "dev", "test"))
    layers = range(len(heard[0].layers))
    codebooks = [fit_units([one.layers[layer] for one in train], num_units, seed, centred) for layer in layers]
    on_dev = [joint(dev, layer, codebooks[layer]).without("SIL").pnmi for layer in layers]
    layer = int(np.argmax(on_dev))
    scores = {"layer": float(layer), "dev_pnmi_speech": on_dev[layer]}
    scores |= {f"dev_pnmi_speech/layer_{number}": value for number, value in enumerate(on_dev)}
    if config.split == "dev":
        scores["phone"] = phone_probe(train, dev, seed)
    elif config.split == "test":
        sources = sorted({one.utterance.source for one in test})
        for source in sources:
            own = [one for one in test if one.utterance.source == source]
            table = joint(own, layer, codebooks[layer])
            scores |= {f"pnmi/{source}": table.pnmi, f"pnmi_speech/{source}": table.without("SIL").pnmi}
            scores |= {f"abx_{name}/{source}": error for name, error in abx_errors(own, layer, config).items()}
        names = {name.split("/")[0] for name in scores if name.endswith(sources[0])}
        scores |= {name: statistics.mean(scores[f"{name}/{source}"] for source in sources) for name in names}
        units = [codebooks[layer].assign(one.layers[layer]) for one in test]
        use = measure_use(units, sum(one.utterance.seconds for one in test))
        scores |= {"unit_perplexity": use.perplexity, "active_units": float(use.num_active)}
        scores["phone"] = phone_probe(train, test, seed)
    scores["speaker"] = speaker_probe(train, seed)
    return scores


def fit_units(frames: Sequence[Frames], num_units: int, seed: int, centred: bool) -> Codebook:
    """A codebook of the frames (T, D) of training utterances, with each utterance's mean taken away if `centred`."""
    import numpy as np

    from sonorant.clustering import fit_kmeans
    from sonorant.models.codebook import centre_frames

    rows = np.concatenate([centre_frames(part) for part in frames] if centred else list(frames))
    return replace(fit_kmeans(rows, num_units, num_restarts=1, seed=seed).codebook, centred=centred)


def phones_of(one: Heard) -> list[str]:
    """The phone of each frame."""
    from sonorant.data.frames import frame_labels

    return frame_labels(one.utterance.phones or (), len(one.layers[0]))


def joint(heard: Sequence[Heard], layer: int, codebook: Codebook) -> Joint:
    """How often each phone and each unit of a layer share a frame."""
    from sonorant.evaluation.units import Joint

    units = (codebook.assign(one.layers[layer]) for one in heard)
    return Joint.of_frames([phones_of(one) for one in heard], units, codebook.num_units)


def abx_errors(heard: Sequence[Heard], layer: int, config: EvaluateConfig) -> Scores:
    """ABX errors of phones in any context, across and within speakers."""
    from sonorant.evaluation.abx import score_abx
    from sonorant.evaluation.abx.items import phone_items

    features = {one.utterance.id: one.layers[layer] for one in heard}
    items = [
        item
        for one in heard
        for item in phone_items(one.utterance.id, one.utterance.speaker, one.utterance.phones or ())
    ]
    return {
        speaker: score_abx(
            items,
            features,
            speaker=speaker,
            context="any",
            max_items=config.abx_max_items,
            max_speakers=config.abx_max_speakers,
            seed=config.seed,
        ).error
        for speaker in SPEAKERS
    }


def phone_probe(train: Sequence[Heard], asked: Sequence[Heard], seed: int) -> float:
    """Accuracy of a linear probe for the phones of frames, silence left out, of speakers that it was not fitted on."""
    import numpy as np

    from sonorant.evaluation.probes.logistic import fit_probe

    rows, labels = speech_frames(train)
    drawn = np.random.default_rng(seed).permutation(len(rows))[:PROBE_FRAMES]
    probe = fit_probe(rows[drawn], [labels[row] for row in drawn], penalty=PHONE_PENALTY)
    return probe.accuracy(*speech_frames(asked))


def speech_frames(heard: Sequence[Heard]) -> tuple[Frames, list[str]]:
    """The frames of all phones but silence with all layers side by side, (N, layers · D), and their phones."""
    import numpy as np

    labels = np.array([label for one in heard for label in phones_of(one)])
    rows = np.concatenate([np.concatenate(one.layers, axis=1) for one in heard])
    is_speech = labels != "SIL"
    return rows[is_speech], labels[is_speech].tolist()


def speaker_probe(train: Sequence[Heard], seed: int) -> float:
    """Accuracy of a linear probe for the speaker of utterances it was not fitted on, from the mean frame."""
    import numpy as np

    from sonorant.evaluation.probes.logistic import held_out_accuracy

    rows = np.stack([np.concatenate([layer.mean(0) for layer in one.layers]) for one in train])
    speakers = [one.utterance.speaker for one in train]
    return held_out_accuracy(rows, speakers, num_folds=4, seed=seed, penalty=SPEAKER_PENALTY)


# ---------------------------------------------------------------------------------------------------------- all runs


def make_inputs(params: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Corpus and units below `folder`, made where they are not of these sections already; their digests."""
    from sonorant.artifacts import read_record
    from sonorant.config import ClusterConfig, PrepareConfig
    from sonorant.steps import cluster, prepare

    def record(name: str) -> dict[str, Any]:
        return read_record(folder / name, name) if (folder / name).is_dir() else {}

    preparing = PrepareConfig.model_validate(params["prepare"])
    clustering = ClusterConfig.model_validate(params["cluster"])
    if record("corpus").get("config") != preparing.model_dump(mode="json"):
        prepare(preparing, corpus=folder / "corpus", scratch=folder / "scratch" / "prepare")
    digest = record("corpus")["digest"]
    made = record("units")
    if (made.get("config"), made.get("inputs")) != (clustering.model_dump(mode="json"), {"corpus": digest}):
        cluster(clustering, corpus=folder / "corpus", units=folder / "units", scratch=folder / "scratch" / "cluster")
    return {name: record(name)["digest"] for name in ("corpus", "units")}


def equal_updates(params: Mapping[str, Any], methods: Sequence[str], seeds: Sequence[int], n: int) -> list[Run]:
    """The baselines, and each method for `n` updates."""
    common = params["pretrain"]
    runs = [Run(name, BASELINE, seed, objective(common, common, seed, n)) for seed in seeds for name in BASELINES]
    recipes = {name: read_recipe(name) for name in methods}
    return runs + [Run(m, UPDATES, seed, objective(common, r, seed, n)) for seed in seeds for m, r in recipes.items()]


def ablations(params: Mapping[str, Any], methods: Sequence[str], seeds: Sequence[int], n: int) -> list[Run]:
    """MGF's scales alone and together, and DinoSR's codebooks as published, for `n` updates."""
    common = params["pretrain"]
    chosen: dict[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {}
    if "dinosr" in methods:
        # Without what the common setting says of codebooks.
        chosen[PUBLISHED_CODES] = {k: v for k, v in common.items() if k != "codebooks"}, read_recipe("dinosr")
    if "mgf" in methods:
        recipe = read_recipe("mgf")
        chosen |= {f"mgf:{scales}": (common, only(recipe, tasks)) for scales, tasks in SCALES.items()}
    return [
        Run(name, UPDATES, seed, objective(shared, recipe, seed, n))
        for seed in seeds
        for name, (shared, recipe) in chosen.items()
    ]


def equal_time(params: Mapping[str, Any], methods: Sequence[str], seeds: Sequence[int], done: Results) -> list[Run]:
    """Each method for as many updates as fit into hubert's time, unless these are as many as it has made."""
    n = int(statistics.median(found["config"]["num_updates"] for found in done["hubert", UPDATES].values()))
    budget = seconds_an_update(done["hubert", UPDATES].values())
    runs = []
    for name in methods:
        finished = [found for found in done.get((name, UPDATES), {}).values() if "scores" in found]
        if not finished:
            continue
        fitting = round(n * budget / seconds_an_update(finished))
        if abs(fitting / n - 1) > NEARLY_EQUAL:
            recipe = read_recipe(name)
            runs += [Run(name, TIME, seed, objective(params["pretrain"], recipe, seed, fitting)) for seed in seeds]
    return runs


def seconds_an_update(found: Iterable[Mapping[str, Any]]) -> float:
    """The median over seeds."""
    return float(statistics.median(one["cpu_seconds"] / one["config"]["num_updates"] for one in found))


def read_recipe(name: str) -> dict[str, Any]:
    """The section `pretrain` of a recipe."""
    from sonorant.params import read_params

    values: dict[str, Any] = read_params([ROOT / "recipes" / f"{name}.yaml"])["pretrain"]
    return values


Results = dict[tuple[str, str], dict[int, dict[str, Any]]]
"""By method and condition, each seed's result."""


def run_all(runs: Sequence[Run], folder: Path, setting: Setting, num_jobs: int) -> Results:
    """All results; runs that have none yet are made, so many at once, in processes of one thread each."""
    missing = [run for run in runs if read_result(folder, run, setting) is None]
    print(f"{len(runs)} runs, {len(runs) - len(missing)} of them done before", flush=True)
    start = time.monotonic()
    if missing:
        context = multiprocessing.get_context("spawn")
        with context.Pool(min(num_jobs, len(missing)), one_thread) as pool:
            jobs = [(run, folder, setting) for run in missing]
            for place, run in enumerate(pool.imap_unordered(execute, jobs), start=1):
                elapsed = time.monotonic() - start
                left = elapsed / place * (len(missing) - place)
                print(f"[{place}/{len(missing)}, {left / 60:.0f} min left] {summary(folder, run)}", flush=True)
    results: Results = {}
    for run in runs:
        found = read_result(folder, run, setting)
        assert found is not None
        results.setdefault((run.method, run.condition), {})[run.seed] = found
    return results


def one_thread() -> None:
    """Called in every process first."""
    import torch

    torch.set_num_threads(1)


def summary(folder: Path, run: Run) -> str:
    """A run in one line."""
    found = json.loads(result_path(folder, run).read_text())
    title = f"{run.method}, {run.condition}, seed {run.seed}"
    if "failed" in found:
        return f"{title}: failed: {found['failed']}"
    spent = f"{found['cpu_seconds']:.0f} CPU s, " if "cpu_seconds" in found else ""
    names = ("layer", "dev_pnmi_speech", "pnmi", "abx_across", "phone", "speaker")
    return f"{title}: {spent}" + ", ".join(f"{name} {found['scores'][name]:.3g}" for name in names)


# ------------------------------------------------------------------------------------------------------------ tables


def by_seed(results: Results, method: str, condition: str, name: str) -> dict[int, float]:
    """A score of each seed, or with `cpu_seconds` and `num_updates` what it took; without the seeds that failed.

    A method that was not run again with equal time has made as many updates as fit.
    """
    found = results.get((method, condition), {})
    if condition == TIME and not found:
        found = results.get((method, UPDATES), {})
    done = {seed: one for seed, one in sorted(found.items()) if "scores" in one}
    if name == "num_updates":
        return {seed: float(one["config"]["num_updates"]) for seed, one in done.items()}
    if name == "cpu_seconds":
        return {seed: one["cpu_seconds"] for seed, one in done.items()}
    return {seed: one["scores"].get(name, math.nan) for seed, one in done.items()}


def column(results: Results, method: str, condition: str, name: str) -> list[float]:
    """The same without the seeds' numbers."""
    return list(by_seed(results, method, condition, name).values())


def show(values: Sequence[float], digits: int = 3) -> str:
    """Mean ± standard deviation."""
    if not values:
        return "failed"
    shown = f"{statistics.mean(values):.{digits}f}"
    if len(values) > 1:
        shown += f" ± {statistics.stdev(values):.{digits}f}"
    return shown.replace("0.", ".")


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def score_table(results: Results, methods: Sequence[str], condition: str, sources: Sequence[str]) -> str:
    """Every method's scores under one condition, and the baselines'."""
    measures = {f"{title}, {s}": f"{key}/{s}" for key, title in MEASURES.items() for s in sources} | PROBES
    rows = []
    extra = [PUBLISHED_CODES] if condition == UPDATES and (PUBLISHED_CODES, UPDATES) in results else []
    for name in (*methods, *extra, *BASELINES):
        own = BASELINE if name in BASELINES else condition
        updates, seconds = (
            ["", ""] if own == BASELINE else [show(column(results, name, own, key), 0) for key in EFFORT]
        )
        scores = [show(column(results, name, own, key)) for key in measures.values()]
        layers = "/".join(f"{layer:.0f}" for layer in column(results, name, own, "layer"))
        rows.append([name, updates, seconds, layers, *scores])
    return markdown(["objective", "updates", "CPU s", "layer", *measures], rows)


def scale_table(results: Results) -> str:
    """MGF's scales alone and together."""
    measures = {title: key for key, title in MEASURES.items()} | PROBES
    rows = [
        [scales, *(show(column(results, name, UPDATES, key)) for key in measures.values())]
        for scales, name in {**{scales: f"mgf:{scales}" for scales in SCALES}, "S+F+P+U": "mgf"}.items()
    ]
    return markdown(["scales", *measures], rows)


def codes(results: Results, method: str, name: str, share: float) -> list[float]:
    """What each seed's journal says of its online codes when `share` of its updates were made."""
    values = []
    for _, found in sorted(results.get((method, UPDATES), {}).items()):
        journal = [entry for entry in found.get("journal", ()) if any(key.endswith(name) for key in entry)]
        if journal:
            entry = min(journal, key=lambda entry: abs(entry["update"] - share * found["config"]["num_updates"]))
            values += [value for key, value in entry.items() if key.endswith(name)]
    return values


def code_table(results: Results, methods: Sequence[str]) -> str:
    """How many online codes are in use as training goes on, and how evenly."""
    rows = [
        [f"{method}, {title}", *(show(codes(results, method, key, share), 0) for share in SHARES)]
        for method in methods
        for key, title in {"/active_codes": "active codes", "/perplexity": "perplexity"}.items()
        if codes(results, method, key, 1.0)
    ]
    return markdown(["codes, equal updates", *(f"at {share:.0%}" for share in SHARES)], rows)


def claims(results: Results) -> dict[str, list[float]]:
    """Each claim as a ratio for each seed; above 1 it holds. Only what was run."""
    found: dict[str, list[float]] = {}

    def compare(name: str, better: str, worse: str, key: str, condition: str = UPDATES) -> None:
        ours, theirs = (by_seed(results, method, condition, key) for method in (better, worse))
        pairs = [(ours[seed], theirs[seed]) for seed in ours if seed in theirs]
        if pairs:
            is_error = key.startswith("abx")
            found[name] = [b / a if is_error else a / b for a, b in pairs]

    for condition, suffix in {UPDATES: "", TIME: "_equal_time"}.items():
        for key in ("pnmi", "abx_across", "phone"):
            for one in ("hubert", "data2vec"):
                compare(f"mt4ssl_vs_{one}_{key}{suffix}", "mt4ssl", one, key, condition)
            compare(f"mt4ssl+codebooks_vs_mt4ssl_{key}{suffix}", "mt4ssl+codebooks", "mt4ssl", key, condition)
        for key in ("speaker", "phone"):
            compare(f"dinosr+utterance_vs_dinosr_{key}{suffix}", "dinosr+utterance", "dinosr", key, condition)
    for method in ("dinosr", PUBLISHED_CODES, "mt4ssl+codebooks", "dinosr+utterance"):
        first, last = (codes(results, method, "/active_codes", share) for share in (SHARES[0], 1.0))
        runs = [run for _, run in sorted(results.get((method, UPDATES), {}).items()) if run.get("journal")]
        if last:
            sizes = [run["config"]["codebooks"]["num_codes"] for run in runs]
            found[f"{method}_active_codes_share"] = [a / b for a, b in zip(last, sizes, strict=True)]
            found[f"{method}_active_codes_kept"] = [a / b for a, b in zip(last, first, strict=True)]
    for key in ("phone", "speaker", "pnmi"):
        singles = {s: v for s in "SFPU" if (v := column(results, f"mgf:{s}", UPDATES, key))}
        if singles:
            best = max(singles, key=lambda scale: statistics.mean(singles[scale]))
            compare(f"mgf_vs_best_single_scale_{key}", "mgf", f"mgf:{best}", key)
            compare(f"mgf_S+F_vs_S_{key}", "mgf:S+F", "mgf:S", key)
            compare(f"mgf_S+F+P_vs_S+F_{key}", "mgf:S+F+P", "mgf:S+F", key)
            compare(f"mgf_all_vs_S+F+P_{key}", "mgf", "mgf:S+F+P", key)
    return found


def claim_table(found: Mapping[str, Sequence[float]]) -> str:
    """Ratios: their mean and each seed's."""
    rows = [
        [name, f"{statistics.mean(values):.3f}", ", ".join(f"{value:.3f}" for value in values)]
        for name, values in found.items()
    ]
    return markdown(["claim (above 1 it holds; a share is at most 1)", "mean", "each seed"], rows)


def main() -> None:
    """Make all runs that are missing, then print the tables and the JSON line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", type=Path, default=ROOT / "recipes" / "runs" / "objectives.yaml")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "objectives", help="where all is kept")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ablation-seeds", type=int, nargs="*", help="default: all seeds")
    parser.add_argument("--conditions", nargs="+", choices=(UPDATES, TIME), default=[UPDATES, TIME])
    parser.add_argument("--num-updates", type=int, help="instead of the configuration's")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, each of one thread")
    options = parser.parse_args()
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
        os.environ[variable] = "1"
    signal.signal(signal.SIGTERM, signal.default_int_handler)

    from sonorant.config import PrepareConfig
    from sonorant.params import check_params, read_params

    try:
        params = read_params([options.config])
        check_params(params)
        for source in params["prepare"]["sources"]:
            if "path" in source:
                source["path"] = str((ROOT / source["path"]).resolve())
        options.folder.mkdir(parents=True, exist_ok=True)
        digests = make_inputs(params, options.folder)
    except ValueError as error:
        parser.error(str(error))
    setting = Setting(params["publish"]["num_units"], params["evaluate"], digests)
    methods, seeds = options.methods, options.seeds
    ablation_seeds = seeds if options.ablation_seeds is None else options.ablation_seeds
    n = options.num_updates or params["pretrain"]["num_updates"]

    runs = equal_updates(params, methods, seeds, n)
    results = run_all(runs, options.folder, setting, options.jobs)
    later = ablations(params, methods, ablation_seeds, n)
    if TIME in options.conditions and ("hubert", UPDATES) in results:
        later += equal_time(params, methods, seeds, results)
    results |= run_all(later, options.folder, setting, options.jobs)

    sources = [source.name for source in PrepareConfig.model_validate(params["prepare"]).sources]
    print(f"\nEqual updates, {len(seeds)} seed(s); layers, then test speakers but for the speaker probe:\n")
    print(score_table(results, methods, UPDATES, sources))
    if TIME in options.conditions:
        print("Equal time:\n\n" + score_table(results, methods, TIME, sources))
    print(code_table(results, [*methods, PUBLISHED_CODES]))
    if "mgf" in methods:
        print(f"MGF's scales, {len(ablation_seeds)} seed(s), equal updates, means of the sources:\n")
        print(scale_table(results))
    found = claims(results)
    print(claim_table(found))
    for (method, condition), seeds_results in results.items():
        for seed, result in seeds_results.items():
            if "failed" in result:
                print(f"failed: {method}, {condition}, seed {seed}: {result['failed']}")
    ratios = {name: round(statistics.mean(values), 3) for name, values in found.items()}
    print(json.dumps({"benchmark": "objectives", "ratios": ratios}))


if __name__ == "__main__":
    main()
