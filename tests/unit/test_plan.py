"""What a study must run: equal work once, seeds where something trains; and what is refused before anything is run."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from sonorant.evaluation.measures import EVERY_MEASURE
from sonorant.params import merged, read_params
from sonorant.studies.plan import SEEDED, Work, ordered, plan_study, read_study
from tests.tiny import pretrain_values

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
RUNS = {
    "targets": ["runs/study"],
    "granularity": ["runs/study"],
    "online-clustering": ["runs/study"],
    "alignment": ["runs/study", "measures/transcripts"],
    "schedules": ["runs/digits", "measures/elsewhere"],
    "schedules-units": ["runs/digits", "measures/elsewhere"],
}
"""The parameters that the Makefile gives each study."""
STUDY: dict[str, Any] = {
    "question": "Is it?",
    "seeds": [3, 5],
    "arms": {
        "plain": {"params": {"pretrain": {"phases": [{"weights": {"units": 1.0}}]}}},
        "more": {"title": "units and teacher"},
    },
    "measures": ["probe_per", "pnmi"],
    "claims": [{"says": "It is", "better": "more", "than": "plain", "by": ["pnmi"]}],
}
PARAMS: dict[str, Any] = {
    "prepare": {"sources": [{"kind": "synthetic", "num_utterances": 9, "num_speakers": 3, "voice": "tones"}]},
    "cluster": {"num_units": 6},
    "pretrain": pretrain_values(num_updates=7),
    "ground": {"num_updates": 4, "phases": [{"weights": {"grounding": 1.0}}]},
    "align": {"num_updates": 3, "phases": [{"weights": {"alignment": 1.0}}], "num_trained_layers": 1},
    "publish": {"num_units": 6},
    "evaluate": {"baselines": []},
}


def write(folder: Path, **changes: Any) -> Path:
    """A study's file."""
    path = folder / "it.yaml"
    path.write_text(yaml.safe_dump({**STUDY, **changes}, sort_keys=False))
    return path


def planned(path: Path, params: Mapping[str, Any], seeds: tuple[int, ...] | None = None) -> dict[str, list[Work]]:
    """The reports of every run of a study, by arm/seed."""
    return plan_study(read_study(path), path.parent, params, seeds)


def counted(runs: Mapping[str, list[Work]]) -> Counter[str]:
    """How many pieces of work there are of each step."""
    return Counter(work.step for work in ordered([work for works in runs.values() for work in works]))


def chain(report: Work) -> dict[str, Work]:
    """What a report needs, by step; of a step that runs twice the last."""
    return {work.step: work for work in report.needed()}


def test_equal_work_is_done_once(tmp_path: Path) -> None:
    runs = planned(write(tmp_path), PARAMS)
    assert list(runs) == ["plain/3", "more/3", "plain/5", "more/5"]
    assert counted(runs) == {"prepare": 1, "cluster": 1, "pretrain": 4, "publish": 4, "evaluate": 4}
    # An arm of another study that says the same of training is the same, under whatever name.
    third = {**STUDY["arms"], "again": STUDY["arms"]["plain"]}
    assert counted(planned(write(tmp_path, arms=third), PARAMS)) == {
        "prepare": 1, "cluster": 1, "pretrain": 4, "publish": 4, "evaluate": 6,
    }  # fmt: skip


def test_keys_name_what_is_made() -> None:
    one = Work("cluster", {"num_units": 6, "seed": 0}, {"corpus": Work("prepare", {"seed": 0})})
    same = Work("cluster", {"seed": 0, "num_units": 6}, {"corpus": Work("prepare", {"seed": 0})})
    others = [
        Work("publish", one.values, one.inputs),
        Work("cluster", {"num_units": 7, "seed": 0}, one.inputs),
        Work("cluster", one.values, {"corpus": Work("prepare", {"seed": 1})}),
        Work("cluster", one.values, {"speech": Work("prepare", {"seed": 0})}),
    ]
    assert one.key == same.key
    assert len({one.key, *(other.key for other in others)}) == 5


def test_inputs_come_before_what_needs_them(tmp_path: Path) -> None:
    works = ordered([work for works in planned(write(tmp_path), PARAMS).values() for work in works])
    keys = [work.key for work in works]
    assert len(set(keys)) == len(keys)
    assert all(keys.index(need.key) < keys.index(work.key) for work in works for need in work.inputs.values())


def test_seeds_go_to_what_trains_alone(tmp_path: Path) -> None:
    takes = {"align": "grounded", "publish": "aligned"}
    runs = planned(write(tmp_path), {**PARAMS, "takes": takes})
    for name, (report,) in runs.items():
        works = chain(report)
        assert set(SEEDED) < set(works)
        for step, work in works.items():
            wanted = int(name.split("/")[1]) if step in SEEDED else None
            assert work.values.get("seed") == wanted, step
        assert works["evaluate"].values["label"] == name
    assert counted(runs)["prepare"] == 1


def test_arms_are_laid_over_the_common_parameters(tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "one.yaml").write_text(
        yaml.safe_dump({"pretrain": {"num_updates": 99, "optim": {"learning_rate": 0.5}}})
    )
    arms = {
        "plain": {"recipe": "recipes/one.yaml", "params": {"pretrain": {"optim": {"learning_rate": 0.25}}}},
        "more": {},
    }
    runs = planned(write(tmp_path, arms=arms), PARAMS)
    plain, more = (chain(runs[f"{arm}/3"][0])["pretrain"].values for arm in ("plain", "more"))
    assert plain["num_updates"] == 99
    assert plain["optim"] == {**PARAMS["pretrain"]["optim"], "learning_rate": 0.25}
    assert more == {**PARAMS["pretrain"], "seed": 3}


def test_the_encoder_goes_where_takes_says(tmp_path: Path) -> None:
    arms = {
        "plain": {},
        "more": {"params": {"takes": {"publish": "aligned"}}},
    }
    runs = planned(write(tmp_path, arms=arms), PARAMS)
    plain, more = (chain(runs[f"{arm}/3"][0]) for arm in ("plain", "more"))
    assert plain["publish"].inputs["encoder"].step == "pretrain"
    assert more["publish"].inputs["encoder"].step == "align"
    assert more["align"].inputs["encoder"].key == plain["pretrain"].key, "the same one, and trained once"
    assert "ground" not in more


def test_two_rounds_share_the_updates_of_one(tmp_path: Path) -> None:
    twice = {"rounds": 2, "second": {"cluster": {"layer": 1}, "pretrain": {"phases": [{"weights": {"units": 1.0}}]}}}
    runs = planned(write(tmp_path, arms={"plain": {}, "more": {"params": twice}}), PARAMS)
    trained = [work for work in runs["more/3"][0].needed() if work.step == "pretrain"]
    first, second = {work.key: work for work in trained}.values()
    assert (first.values["num_updates"], second.values["num_updates"]) == (3, 3), "halves of 7"
    assert first.values["phases"] == PARAMS["pretrain"]["phases"]
    assert second.values["phases"] == twice["second"]["pretrain"]["phases"]
    assert (first.values["seed"], second.values["seed"]) == (3, 3)
    clustered = second.inputs["units"]
    assert (clustered.values, clustered.inputs["encoder"].key) == ({"num_units": 6, "layer": 1}, first.key)
    assert chain(runs["plain/3"][0])["pretrain"].values["num_updates"] == 7


def test_two_rounds_halve_what_nobody_has_set(tmp_path: Path) -> None:
    params = {**PARAMS, "pretrain": {k: v for k, v in PARAMS["pretrain"].items() if k != "num_updates"}}
    twice = {"rounds": 2, "second": {"cluster": {"layer": 1}}}
    runs = planned(write(tmp_path, arms={"plain": {}, "more": {"params": twice}}), params)
    assert chain(runs["more/3"][0])["pretrain"].values["num_updates"] == 200_000


@pytest.mark.parametrize("takes", [{}, {"publish": "grounded"}, {"publish": "encoder", "align": "encoder"}])
def test_grounding_may_begin_from_nothing(tmp_path: Path, takes: dict[str, str]) -> None:
    runs = planned(write(tmp_path, begins="ground"), {**PARAMS, "takes": takes})
    works = chain(runs["more/3"][0])
    assert list(works) == ["prepare", "cluster", "ground", "publish", "evaluate"]
    assert works["ground"].values["encoder"] == PARAMS["pretrain"]["encoder"]
    assert set(works["ground"].inputs) == {"corpus", "units"}
    assert works["publish"].inputs["encoder"].key == works["ground"].key


def test_what_began_with_grounding_may_be_aligned(tmp_path: Path) -> None:
    runs = planned(write(tmp_path, begins="ground"), {**PARAMS, "takes": {"publish": "aligned"}})
    works = chain(runs["more/3"][0])
    assert works["align"].inputs["encoder"].step == "ground"
    assert works["publish"].inputs["encoder"].step == "align"
    assert "pretrain" not in works


def test_elsewhere_is_another_report_of_the_same_model(tmp_path: Path) -> None:
    other = merged([PARAMS["prepare"], {"seed": 9}])
    elsewhere = {"elsewhere": {"prepare": other, "evaluate": {"split": "dev"}}}
    runs = planned(write(tmp_path), {**PARAMS, **elsewhere})
    here, there = runs["plain/5"]
    assert here.inputs["model"].key == there.inputs["model"].key
    assert (here.values, there.values) == (
        {"baselines": [], "label": "plain/5"}, {"split": "dev", "label": "plain/5"},
    )  # fmt: skip
    assert there.inputs["corpus"].values == other
    assert counted(runs) == {"prepare": 2, "cluster": 1, "pretrain": 4, "publish": 4, "evaluate": 8}
    # The other corpus alone is no second one to train on.
    assert chain(here)["publish"].inputs["corpus"].key == here.inputs["corpus"].key


@pytest.mark.parametrize("name", sorted(path.stem for path in (RECIPES / "studies").glob("*.yaml")))
def test_a_study_of_the_checkout_plans_without_data(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = RECIPES / "studies" / f"{name}.yaml"
    monkeypatch.chdir(tmp_path)
    study = read_study(path)
    assert set(study.measures) <= set(EVERY_MEASURE)
    deciding = {key for claim in study.claims for key in claim.by}
    assert all(EVERY_MEASURE[key].better for key in deciding)
    assert deciding <= set(study.measures), "what decides is a column too"
    runs = planned(path, read_params([RECIPES / f"{run}.yaml" for run in RUNS[name]]))
    assert len(runs) == len(study.arms) * len(study.seeds)
    assert len(study.seeds) >= 3, "two seeds tell next to nothing"
    trained = {
        run: sum(w.values["num_updates"] for w in {w.key: w for w in reports[0].needed()}.values() if w.step in SEEDED)
        for run, reports in runs.items()
    }
    # What is aligned has those updates beside what it is compared with; all else is compared at equal numbers.
    assert len(set(trained.values())) == (2 if name == "alignment" else 1)
    assert counted(runs)["evaluate"] == sum(map(len, runs.values()))
    assert list(tmp_path.iterdir()) == []


def test_every_study_has_its_parameters() -> None:
    assert set(RUNS) == {path.stem for path in (RECIPES / "studies").glob("*.yaml")}
    makefile = (RECIPES.parent / "Makefile").read_text()
    lines = [line for line in makefile.splitlines() if line.startswith("\t$(STUDY)")]
    assert len(lines) == 3
    for line in lines:
        for name in re.findall(r"[a-z-]+", line.removeprefix("\t$(STUDY)").partition("--config")[0]):
            assert re.findall(r"recipes/([a-z/]+)\.yaml", line) == RUNS[name]


CLAIM = STUDY["claims"][0]
FAULTY: list[tuple[dict[str, Any], str]] = [
    ({"claims": [{**CLAIM, "than": "nobody"}]}, "found the arms ['nobody'] in claims or published, wanted some of"),
    ({"published": {"nobody": {"PER": 3.0}}}, "found the arms ['nobody'] in claims or published, wanted some of"),
    ({"seeds": [1, 2, 1]}, "study: found the seeds (1, 2, 1), wanted each once"),
    ({"seeds": [-1]}, "study.seeds.0: found -1, wanted greater than or equal to 0"),
    ({"seeds": []}, "study.seeds: "),
    ({"claims": [{**CLAIM, "by": ["probe_perr"]}]}, "found the score probe_perr, wanted one of abx_across_any, "),
    ({"measures": ["per"]}, "measures: found the score per, wanted one of abx_across_any, "),
    ({"claims": [{**CLAIM, "by": ["bitrate"]}]}, "found the score bitrate, wanted one that has a better direction"),
    ({"claims": [{**CLAIM, "by": []}]}, "study.claims.0.by: "),
    ({"asks": "What?"}, "study.asks: found an unknown key"),
    ({"begins": "align"}, "study.begins: found 'align', wanted 'pretrain' or 'ground'"),
    ({"arms": {"plain": {"recipes": "x"}, "more": {}}}, "study.arms.plain.recipes: found an unknown key"),
    ({"question": None}, "study.question: found None, wanted a valid string"),
]


@pytest.mark.parametrize(("changes", "message"), FAULTY, ids=[message[:50] for _, message in FAULTY])
def test_a_faulty_study_is_one_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        read_study(write(tmp_path, **changes))
    assert str(caught.value).startswith(f"{tmp_path / 'it.yaml'}: ")
    assert "\n" not in str(caught.value)


UNFIT: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"pretrian": {}}, {}, "arm plain: params: found the sections ['align', "),
    ({"evaluate": None}, {}, "arm plain: evaluate: found None, wanted a valid dictionary"),
    ({"pretrain": 3}, {}, "arm more: pretrain: found 3, wanted a valid dictionary"),
    ({"pretrain": {"num_updates": "x"}, "rounds": 2}, {}, "arm plain: pretrain.num_updates: found 'x', wanted a valid"),
    ({"rounds": 2}, {}, "arm plain: second.cluster.layer: found nothing, wanted a layer of the first round's"),
    ({"rounds": 2, "second": {"cluster": {"layer": 7}}}, {}, "second.cluster.layer: found 7, wanted 0 to 2"),
    ({"takes": {"publish": "units"}}, {}, "takes.publish: found 'units', wanted 'encoder', 'grounded' or 'aligned'"),
    ({"elsewhere": {"evaluate": {}}}, {}, "arm plain: elsewhere.prepare: found nothing, wanted a value: add it"),
    ({"elsewhere": {"prepare": PARAMS["prepare"], "measure": {}}}, {}, "elsewhere.measure: found an unknown key"),
    ({"ground": {}}, {"begins": "ground"}, "arm plain: ground.phases: found nothing, wanted a value: add it"),
    ({}, {"arms": {"plain": {"recipe": "none.yaml"}, "more": {}}}, "none.yaml: found no such file"),
]


@pytest.mark.parametrize(("params", "changes", "message"), UNFIT, ids=[message[:50] for *_, message in UNFIT])
def test_unfit_parameters_are_one_line(
    tmp_path: Path, params: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        planned(write(tmp_path, **changes), {**PARAMS, **params})
    assert "\n" not in str(caught.value)


SCORES = ["probe_per", "probe_cer", "unit_edits_room", "speech_to_image_recall_at_1", "training_perplexity"]
LACKS = [
    "arms more, plain: found no evaluate.probes.phones, wanted it, for a claim goes by probe_per: ",
    "found no evaluate.probes.text, wanted it, for a claim goes by probe_cer: ",
    "found no evaluate.max_changed above 0, wanted it, for a claim goes by unit_edits_room: ",
    "found no grounding among what ground.phases weigh with takes.publish grounded, wanted it, for a claim goes",
    "found no codebooks or contrast among what pretrain.phases weigh, wanted it, for a claim goes by training_perp",
]


def test_claims_go_by_what_is_measured(tmp_path: Path) -> None:
    path = write(tmp_path, claims=[{**CLAIM, "by": [*SCORES, "pnmi"]}])
    unmeasured = {**PARAMS, "evaluate": {"max_changed": 0}}
    with pytest.raises(ValueError, match=r"^study: arms more, plain: ") as caught:
        planned(path, unmeasured)
    faults = str(caught.value).removeprefix("study: ").split("; ")
    assert len(faults) == len(LACKS)
    assert all(wanted in fault for wanted, fault in zip(LACKS, faults, strict=True)), faults
    measured = {
        **PARAMS,
        "takes": {"publish": "grounded"},
        "ground": {"num_updates": 4, "phases": [{"weights": {"grounding": 1.0, "contrast": 1.0}}]},
        "evaluate": {"probes": {"phones": {}, "text": {}}},
    }
    assert planned(path, measured)
    # What is measured elsewhere is measured.
    elsewhere = {"prepare": PARAMS["prepare"], "evaluate": {"probes": {"phones": {}, "text": {}}}}
    measured = {**measured, "evaluate": {"max_changed": 0}, "elsewhere": elsewhere}
    assert planned(path, measured)


def test_only_the_arms_of_a_claim_must_have_its_scores(tmp_path: Path) -> None:
    other = {"params": {"evaluate": {"probes": {"phones": {}}}}}
    claims = [{"says": "", "better": "fourth", "than": "third", "by": ["probe_per"]}]
    assert planned(write(tmp_path, arms={**STUDY["arms"], "third": other, "fourth": other}, claims=claims), PARAMS)


def test_the_arms_of_a_claim_are_measured_alike(tmp_path: Path) -> None:
    arms = {"plain": {}, "more": {"params": {"evaluate": {"split": "dev", "seed": 3}}}}
    with pytest.raises(ValueError, match=r"^study: arms more, plain: found evaluate.split 'dev' and 'test'") as caught:
        planned(write(tmp_path, arms=arms), PARAMS)
    assert "found evaluate.seed 3 and 0, wanted the same, for a claim compares them: set it" in str(caught.value)
    arms = {"plain": {}, "more": {"params": {"elsewhere": {"prepare": PARAMS["prepare"]}}}}
    with pytest.raises(ValueError, match=r"^study: arms more, plain: found 2 and 1 corpora that they are measured on"):
        planned(write(tmp_path, arms=arms), PARAMS)
    # Written or by default is the same.
    arms = {"plain": {}, "more": {"params": {"evaluate": {"split": "test", "num_examples": 0}}}}
    assert planned(write(tmp_path, arms=arms), PARAMS)


@pytest.mark.parametrize("missing", ["prepare", "cluster", "pretrain", "publish", "evaluate"])
def test_a_missing_section_is_one_line(tmp_path: Path, missing: str) -> None:
    path = write(tmp_path, arms={"plain": {}, "more": {}})
    with pytest.raises(ValueError, match=r"arm plain: params: found the sections .* add, remove or respell") as caught:
        planned(path, {key: values for key, values in PARAMS.items() if key != missing})
    assert missing in str(caught.value)
    assert "\n" not in str(caught.value)


def test_grounding_from_nothing_wants_its_section(tmp_path: Path) -> None:
    path = write(tmp_path, begins="ground", arms={"plain": {}, "more": {}})
    for missing in ("ground", "pretrain"):
        params = {key: values for key, values in PARAMS.items() if key != missing}
        with pytest.raises(ValueError, match=f"arm plain: .*{missing}"):
            planned(path, params)
