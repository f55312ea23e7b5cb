"""Two rounds: units anew from a layer of the first round's encoder, and a second encoder trained on them."""

from __future__ import annotations

import html
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from sonorant.artifacts import read_record
from sonorant.data.corpus import read_corpus
from sonorant.data.units import UnitStore
from sonorant.inference import load_trained
from sonorant.models.codebook import Codebook
from sonorant.params import parse_round
from sonorant.steps import cluster, pretrain
from tests.tiny import pretrain_values, write_tone_corpus

ROOT = Path(__file__).resolve().parents[2]
PARAMS: dict[str, Any] = {
    "prepare": {
        "sources": [
            {
                "kind": "synthetic",
                "num_utterances": 18,
                "num_speakers": 6,
                "voice": "tones",
                "dev_share": 0.2,
                "test_share": 0.3,
            }
        ]
    },
    "rounds": 1,
    "takes": {"align": "encoder", "publish": "encoder"},
    "cluster": {"num_units": 6, "num_restarts": 1, "context_frames": 1, "num_workers": 1},
    "pretrain": pretrain_values(num_updates=2),
    "second": {"cluster": {"layer": 1, "num_units": 5, "context_frames": 0}, "pretrain": {"num_updates": 3}},
    "publish": {"num_units": 6, "num_restarts": 1, "layer": 1},
    "evaluate": {"num_examples": 0, "abx_max_items": 2, "abx_max_speakers": 1, "num_workers": 1},
}
ARTIFACTS = ("round-1/units", "round-1/encoder", "round-2/units", "round-2/encoder", "model", "report")

Run = Callable[..., subprocess.CompletedProcess[str]]


def runner(folder: Path) -> Run:
    """A command in `folder`, with this environment's programs."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    who = {f"GIT_{role}_{key}": "a@b" for role in ("AUTHOR", "COMMITTER") for key in ("NAME", "EMAIL")}
    quiet = {"DVC_NO_ANALYTICS": "1", "SONORANT_RUNS": str(folder / "runs"), "NO_COLOR": "1", "COLUMNS": "200"}
    environment = {**os.environ, **who, **quiet, "PATH": path}

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)

    return run


def digests(folder: Path) -> dict[str, str]:
    """The digests of those artifacts that are there."""
    paths = {name: folder / "artifacts" / name for name in ARTIFACTS}
    return {name: read_record(path, name)["digest"] for name, path in paths.items() if path.exists()}


def published(folder: Path) -> tuple[int, str]:
    """How many rounds the published model says it is of, and its encoder's digest."""
    provenance = json.loads((folder / "artifacts" / "model" / "provenance.json").read_text())
    return provenance["rounds"], provenance["encoder"]["digest"]


def units_behind(encoder: Path) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """What an encoder's record alone says of each round, the last first: how its units and its encoder were made."""
    record = read_record(encoder, "encoder")
    lineage, made, found = record["lineage"], record, []
    while True:
        units = lineage[made["inputs"]["units"]]
        assert (made["step"], units["step"]) == ("pretrain", "cluster")
        found.append((units, made))
        if "encoder" not in units["inputs"]:
            return found
        made = lineage[units["inputs"]["encoder"]]


@pytest.fixture
def tones(tmp_path: Path) -> Path:
    """A folder with parameters, and the tone corpus as its corpus."""
    corpus, _ = write_tone_corpus(tmp_path / "tones")
    (tmp_path / "artifacts").mkdir()
    corpus.rename(tmp_path / "artifacts" / "corpus")
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(PARAMS))
    return tmp_path


def test_the_second_round_learns_units_of_the_first_rounds_encoder(
    tones: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SONORANT_RUNS", str(tones / "runs"))
    artifacts = tones / "artifacts"
    corpus, encoder = artifacts / "corpus", None
    for number in (1, 2):
        units = artifacts / f"round-{number}" / "units"
        cluster(parse_round("cluster", PARAMS, number), corpus=corpus, encoder=encoder, units=units)
        encoder = units.with_name("encoder")
        pretrain(parse_round("pretrain", PARAMS, number), corpus=corpus, units=units, encoder=encoder)
    utterances = read_corpus(artifacts / "corpus")
    first, second = (UnitStore(artifacts / f"round-{number}" / "units") for number in (1, 2))
    assert (first.about["layer"], first.num_units, first.about["context_frames"]) == (None, 6, 1)
    assert (second.about["layer"], second.num_units, second.about["context_frames"]) == (1, 5, 0)

    codebook = Codebook.load(artifacts / "round-2" / "units" / "codebook.safetensors")
    speech = load_trained(artifacts / "round-1" / "encoder")
    nearest = [codebook.assign(speech.embed([u.wave()], 1)[0]) for u in utterances]
    same = np.concatenate([second[u.id] == units for u, units in zip(utterances, nearest, strict=True)])
    # Batched frames equal single ones to 1e-4; a frame that lies so close to a border may change sides.
    assert same.mean() > 0.99

    (units, trained), (first_units, first_trained) = units_behind(artifacts / "round-2" / "encoder")
    assert (trained["config"]["num_updates"], first_trained["config"]["num_updates"]) == (3, 2)
    assert (units["config"]["layer"], first_units["config"]["layer"]) == (1, None)
    assert trained["inputs"]["units"] == read_record(artifacts / "round-2" / "units", "units")["digest"]
    assert first_trained["inputs"]["units"] == read_record(artifacts / "round-1" / "units", "units")["digest"]
    # Nothing of either round is kept for a retry, so neither ran in the other's folder.
    assert list((tones / "runs").iterdir()) == []


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["cluster", "--round", "3"], "cluster: --round: found 3, wanted 1 or 2: correct it"),
        (
            ["cluster", "--round", "2", "--set", "second.cluster.layer=null"],
            "cluster: second.cluster.layer: found nothing, wanted a layer of the first round's encoder: add it",
        ),
        (
            ["cluster", "--round", "2"],
            "cluster: cluster.layer: found 1 without an encoder, wanted one: add --encoder or set layer to null",
        ),
        (
            ["cluster", "--set", "rounds=3"],
            "cluster: rounds: found 3, wanted less than or equal to 2",
        ),
        (
            ["cluster", "--round", "2", "--set", "second.cluster.num_unit=3"],
            "cluster: second.cluster.num_unit: found an unknown key, wanted one that sonorant/config lists: "
            "remove or respell it",
        ),
        (
            ["cluster", "--set", "second.cluter.layer=3"],
            "cluster: second.cluter: found an unknown key, wanted one that sonorant/config lists: "
            "remove or respell it",
        ),
    ],
)
def test_a_wrong_round_is_said_on_one_line(tones: Path, words: list[str], wanted: str) -> None:
    paths = ["--config", "params.yaml", "--corpus", "artifacts/corpus", "--units", "artifacts/units"]
    answer = runner(tones)(sys.executable, "-m", "sonorant", *words, *paths)
    assert (answer.returncode, answer.stdout) == (1, "")
    assert answer.stderr == f"{wanted}\n"
    assert not (tones / "artifacts" / "units").exists()


def test_steps_that_run_once_know_no_rounds(tones: Path) -> None:
    run = runner(tones)
    assert "--round" in run(sys.executable, "-m", "sonorant", "pretrain", "--help").stdout
    assert "--round" not in run(sys.executable, "-m", "sonorant", "publish", "--help").stdout


@pytest.mark.slow
def test_dvc_runs_as_many_rounds_as_asked_for_and_keeps_both(tmp_path: Path) -> None:
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    shutil.copytree(ROOT / "optional", tmp_path / "optional", ignore=shutil.ignore_patterns("dvc.lock"))
    params = tmp_path / "params.yaml"
    run = runner(tmp_path)

    def repro(rounds: int) -> list[str]:
        """The stages that ran, in their order."""
        params.write_text(yaml.safe_dump({**PARAMS, "rounds": rounds}))
        answer = run("dvc", "repro")
        assert answer.returncode == 0, answer.stdout + answer.stderr
        return [line.split("'")[1] for line in answer.stdout.splitlines() if line.startswith("Running stage")]

    for words in (["git", "init", "-q"], ["dvc", "init", "-q"], ["git", "commit", "-qm", "one"]):
        assert run(*words).returncode == 0
    assert repro(1) == ["prepare", "cluster", "pretrain", "publish", "evaluate"]
    one = digests(tmp_path)
    assert set(one) == {"round-1/units", "round-1/encoder", "model", "report"}
    assert published(tmp_path) == (1, one["round-1/encoder"])

    assert repro(2) == ["optional/dvc.yaml:cluster", "optional/dvc.yaml:pretrain", "publish", "evaluate"]
    two = digests(tmp_path)
    assert set(two) == set(ARTIFACTS)
    assert {name for name in one if one[name] != two[name]} == {"model", "report"}
    assert two["round-1/units"] != two["round-2/units"]
    assert published(tmp_path) == (2, two["round-2/encoder"])
    assert '"rounds": 2' in html.unescape((tmp_path / "artifacts" / "report" / "report.html").read_text())
    model = read_record(tmp_path / "artifacts" / "model", "model")
    # The model alone leads back to the first round's units, and further.
    assert set(model["lineage"]) == {*(two[name] for name in ARTIFACTS[:4]), model["inputs"]["corpus"]}

    # Both are in the cache: nothing runs again.
    assert repro(1) == []
    assert {name: digests(tmp_path)[name] for name in one} == one
    assert repro(2) == []
    assert digests(tmp_path) == two

    graph = run("dvc", "dag", "--dot").stdout
    for edge in (
        '"pretrain" -> "optional/dvc.yaml:cluster"',
        '"optional/dvc.yaml:cluster" -> "optional/dvc.yaml:pretrain"',
        '"optional/dvc.yaml:pretrain" -> "publish"',
    ):
        assert edge in graph
    assert '"pretrain" -> "publish"' not in graph
