"""The built-in corpus: its bytes, its times, its splits and its pictures."""

from __future__ import annotations

import hashlib
import io
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image
from scipy import ndimage
from scipy import signal as filters

from sonorant.config import SyntheticSource
from sonorant.data import synthesis
from sonorant.data.corpus import Row
from sonorant.data.frames import SAMPLE_RATE
from sonorant.data.synthesis import draw_speakers, engine_name, espeak, plan_utterances, synthesise
from sonorant.data.synthesis.recording import record
from sonorant.data.synthesis.scenes import (
    COLOURS,
    RELATIONS,
    SHAPES,
    Scene,
    Thing,
    draw_image,
    draw_scenes,
    held_out_pairs,
)
from sonorant.data.synthesis.tones import ToneEngine
from sonorant.data.synthesis.voices import LEXICON, NUM_VOICES, VOWELS, Spoken, is_espeak_installed

SRC = Path(synthesis.__file__).resolve().parents[3]
NUM = 36  # utterances: one whole shard and a part of another
NUM_SPEAKERS = 36  # enough for some of espeak-ng's breathy voices, which depend on its seed

Made = tuple[str, Path, list[Row]]
"""An engine's name, the folder of its corpus, and the rows."""


def section(voice: str = "tones", **changes: object) -> SyntheticSource:
    return SyntheticSource.model_validate(
        {"voice": voice, "num_utterances": NUM, "num_speakers": NUM_SPEAKERS, **changes}
    )


def digests(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def needs_espeak() -> None:
    if not is_espeak_installed():
        pytest.skip("espeakng-loader is not installed: pip install 'sonorant[synthesis]'")


@pytest.fixture(scope="module", params=["espeak", "tones"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """One corpus per engine."""
    if request.param == "espeak":
        needs_espeak()
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, folder, synthesise(section(request.param), folder, num_workers=2)


# ----------------------------------------------------------------------------------------------------- bytes


def test_bytes_depend_on_the_section_alone(made: Made, tmp_path: Path) -> None:
    voice, folder, rows = made
    # Left by another section, with one shard more and a worker that was killed.
    synthesise(section(num_utterances=1, seed=5), tmp_path)
    (tmp_path / "shard-00000").rename(tmp_path / "shard-00009")
    (tmp_path / ".partial-x").mkdir()
    again = synthesise(section(voice), tmp_path, num_workers=1)
    assert digests(tmp_path) == digests(folder)
    assert [replace(row, path=folder / row.path.relative_to(tmp_path), image=None) for row in again] == [
        replace(row, image=None) for row in rows
    ]


def test_another_seed_makes_another_corpus(tmp_path: Path) -> None:
    one, other = (synthesise(section(num_utterances=4, seed=s), tmp_path / str(s)) for s in (0, 1))
    assert not {row.path.read_bytes() for row in one} & {row.path.read_bytes() for row in other}
    assert [row.text for row in one] != [row.text for row in other]


def test_killed_and_run_again_gives_the_same_bytes(made: Made, tmp_path: Path) -> None:
    voice, folder, _ = made
    # Once with its workers, as a cluster does; once alone, as a person does: the workers then end alone.
    kill = os.killpg if voice == "espeak" else os.kill
    code = (
        "import sys, pathlib; from sonorant.config import SyntheticSource;"
        "from sonorant.data.synthesis import synthesise;"
        "synthesise(SyntheticSource.model_validate_json(sys.argv[1]), pathlib.Path(sys.argv[2]), 1)"
    )
    arguments = [sys.executable, "-c", code, section(voice).model_dump_json(), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(SRC)}
    process = subprocess.Popen(arguments, env=environment, start_new_session=True)
    # Killed while a worker is in the middle of the first shard.
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".partial-*/shard/*-000003.flac")) and time.monotonic() < deadline:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.005)
    kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "shard-00001").exists()
    synthesise(section(voice), tmp_path, num_workers=2)
    assert digests(tmp_path) == digests(folder)


def test_finished_shards_are_kept_and_reported(made: Made) -> None:
    voice, folder, rows = made
    before = {path: path.stat().st_ino for path in folder.rglob("*")}
    calls: list[tuple[int, int]] = []
    again = synthesise(section(voice), folder, progress=lambda done, total: calls.append((done, total)))
    assert again == rows
    assert calls == [(NUM, NUM)]
    assert {path: path.stat().st_ino for path in folder.rglob("*")} == before


def test_progress_counts_every_utterance(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    synthesise(section(num_utterances=5), tmp_path, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(done, 5) for done in range(6)]


def test_a_worker_that_dies_is_reported(tmp_path: Path) -> None:
    def kill_workers(_done: int, _total: int) -> None:
        for process in multiprocessing.active_children():
            process.kill()

    with pytest.raises(ValueError, match=r"^[^\n]*found a worker that ended with [^\n]*run again[^\n]*$"):
        synthesise(section(), tmp_path, num_workers=1, progress=kill_workers)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    shards = synthesis.plan_shards(section(), tmp_path / "missing")
    with pytest.raises(ValueError, match=r"^[^\n]*00000: found [^\n]*No such file[^\n]*run again[^\n]*$"):
        list(synthesis.run_shards(shards, num_workers=1))


# --------------------------------------------------------------------------------------------------- engines


def test_without_the_loader_auto_speaks_in_tones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    assert engine_name(section("auto")) == "tones"
    with pytest.raises(ValueError, match=r"^[^\n]*'synthetic'[^\n]*'sonorant\[synthesis\]'[^\n]*$"):
        engine_name(section("espeak"))


def test_with_the_loader_auto_is_espeak() -> None:
    needs_espeak()
    assert engine_name(section("auto")) == engine_name(section("espeak")) == "espeak"
    assert engine_name(section("tones")) == "tones"


def test_every_espeak_voice_exists() -> None:
    needs_espeak()
    import espeakng_loader

    # The library would speak with its plain voice and say nothing.
    variants = Path(espeakng_loader.get_data_path()) / "voices" / "!v"
    assert [name for name in espeak.VARIANTS if not (variants / name).is_file()] == []
    assert len(set(espeak.VARIANTS)) == NUM_VOICES


@pytest.mark.parametrize("most_bytes", [120, 10_000], ids=["linked", "as it is"])
def test_espeak_needs_a_short_path_to_its_data(most_bytes: int, tmp_path: Path) -> None:
    needs_espeak()
    # In a process of its own: the library may be opened once.
    code = (
        "import sys, pathlib, espeakng_loader as loader; from sonorant.data.synthesis import espeak;"
        "far = pathlib.Path(sys.argv[1], *['x' * 50] * 4); far.mkdir(parents=True); far /= 'data';"
        "far.symlink_to(loader.get_data_path()); library = pathlib.Path(loader.get_library_path())\n"
        "with espeak.short_path(far, int(sys.argv[2])) as data:\n"
        "    print(len(espeak.EspeakEngine(library, data, 0).say(['a', 'small', 'star'], 0, 1.0, 0.0).words))"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path), str(most_bytes)]
    environment = {**os.environ, "PYTHONPATH": str(SRC)}
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=60)
    if most_bytes == 120:
        assert done.stdout.strip() == "3", done.stderr
    else:
        assert "OSError: sample rate" in done.stderr


def test_closures_go_to_stops_and_closing_l_to_vowels() -> None:
    # "small to", the last 5 samples of l silent; then a pause without length.
    pcm = np.full(60, 1000, np.int16)
    pcm[35:40] = 0
    small = [(1, 0, "s"), (1, 10, "m"), (1, 20, "ɔː"), (1, 30, "l")]
    events = [*small, (7, 40, "t"), (7, 50, "ə"), (7, 60, "")]
    folded = [(s.label, s.start, s.end) for s in espeak.fold(events, pcm)]
    assert folded == [("s", 0, 10), ("m", 10, 20), ("ao", 20, 35), ("t", 35, 50), ("ah", 50, 60)]


def test_l_before_a_vowel_stays() -> None:
    events = [(1, 0, "j"), (1, 10, "ɛ"), (1, 20, "l"), (1, 30, "oʊ")]
    folded = [(s.label, s.start, s.end) for s in espeak.fold(events, np.full(40, 1000, np.int16))]
    assert folded == [("y", 0, 10), ("eh", 10, 20), ("l", 20, 30), ("ow", 30, 40)]


def test_joined_words_are_parted() -> None:
    labels = [("ah", 1), ("v", 1), ("ah", 1), ("r", 6), ("eh", 6), ("d", 6)]
    segments = [espeak.Segment(label, position, i, i + 1) for i, (label, position) in enumerate(labels)]
    assert list(espeak.find_words(["of", "a", "red"], segments)) == [("of", 0, 2), ("a", 2, 3), ("red", 3, 6)]


# ----------------------------------------------------------------------------------------------------- times


def test_files_are_what_they_should_be(made: Made) -> None:
    _, folder, rows = made
    assert len(rows) == NUM
    assert len({row.id for row in rows}) == NUM
    for row in rows:
        about = soundfile.info(row.path)
        assert (about.format, about.subtype, about.samplerate, about.channels) == (
            "FLAC",
            "PCM_16",
            SAMPLE_RATE,
            1,
        )
        assert row.path.is_relative_to(folder)
        wave = soundfile.read(row.path)[0]
        # record leaves 3 % of headroom; speech at -30 dB with the room's worst crest is still far above 1 %.
        assert 0.01 < np.abs(wave).max() < 0.98
        assert row.image is not None
        with Image.open(row.image) as image:
            assert (image.size, image.mode) == ((96, 96), "RGB")


def test_phones_cover_the_file_and_make_up_the_words(made: Made) -> None:
    for row in made[2]:
        assert row.phones is not None
        assert row.words is not None
        edges = [time for _, start, end in row.phones for time in (start, end)]
        assert edges[0] == 0
        assert edges[-1] == soundfile.info(row.path).frames / SAMPLE_RATE
        assert edges[1:-1:2] == edges[2::2]
        assert all(start < end for _, start, end in row.phones)
        # Exact to a sample: every time is one, but for float64's rounding of the quotient.
        assert all(abs(time * SAMPLE_RATE - round(time * SAMPLE_RATE)) < 1e-6 for time in edges)
        assert " ".join(word for word, _, _ in row.words) == row.text
        for word, first, last in row.words:
            said = tuple(label for label, start, end in row.phones if first <= start and end <= last)
            # espeak-ng adds an r where the word runs into a vowel.
            assert said in (LEXICON[word], (*LEXICON[word], "r"))


def test_fricatives_begin_where_they_are_said_to(made: Made) -> None:
    """Of all splits of ±60 ms around "a s-", hiss rises most at the labelled onset."""
    offsets = []
    sections = filters.butter(4, 3800, "highpass", fs=SAMPLE_RATE, output="sos")
    for row in made[2]:
        assert row.phones is not None
        reach = round(0.06 * SAMPLE_RATE)
        # Padded, for the first of them may begin less than two reaches into the file.
        hiss = np.pad(filters.sosfiltfilt(sections, soundfile.read(row.path)[0]), 2 * reach, "reflect")
        for (before, _, _), (after, onset, _) in itertools.pairwise(row.phones):
            if before in VOWELS and after == "s":
                centre = 2 * reach + round(onset * SAMPLE_RATE)
                near = hiss[centre - 2 * reach : centre + 2 * reach].reshape(-1, 32)
                level = np.log(near**2 + 1e-9).mean(axis=1)
                # Steps of 2 ms; the mean of 20 ms after less that of 20 ms before, at -60 to 60 ms.
                rise = [level[i : i + 10].mean() - level[i - 10 : i].mean() for i in range(30, 91)]
                offsets.append(2 * (int(np.argmax(rise)) - 30))
    assert len(offsets) > 20
    # One hop of 2 ms, and espeak-ng's fricatives fade in over about 5 ms; noise at 5 dB moves single ones.
    assert abs(float(np.median(offsets))) <= 8, offsets
    assert np.mean(np.abs(offsets) <= 16) > 0.7, offsets


def test_record_moves_times_with_the_sound() -> None:
    speaker = draw_speakers(section())[0]
    wave = np.zeros(22_050)
    wave[10_000] = 1.0
    spoken = Spoken(wave, (("ah", 0, 10_000), ("t", 10_000, 22_050)), (("at", 0, 22_050),))
    for warp in (65, 73, 82):
        heard = record(spoken, replace(speaker, warp=warp, tilt=0.0), np.random.default_rng(0))
        (_, _, lead), _, (_, onset, _), _ = heard.phones
        assert onset - lead == round(10_000 * warp / 100)
        # The click may fall between two samples: one off.
        assert abs(int(np.abs(heard.wave).argmax()) - onset) <= 1


def test_tones_differ_by_phone_more_than_by_voice() -> None:
    """Nearest centroid over mean spectra: unseen voices' phones are told apart far above chance."""
    engine = ToneEngine(0)
    spectra: dict[str, list[np.ndarray]] = {}
    for voice in range(0, NUM_VOICES, 10):
        spoken = engine.say(list(LEXICON), voice, 1.0, 0.0)
        for label, start, end in spoken.phones:
            power = np.abs(np.fft.rfft(spoken.wave[start:end] * np.hanning(end - start), 4096)) ** 2
            bands = np.log([band.mean() + 1e-9 for band in np.array_split(power[20:1800], 40)])
            spectra.setdefault(label, []).append(np.append(bands - bands.mean(), np.std(bands)))
    train = {label: np.mean(values[: len(values) * 2 // 3], axis=0) for label, values in spectra.items()}
    hits = [
        min(train, key=lambda known: float(np.sum((train[known] - value) ** 2))) == label
        for label, values in spectra.items()
        for value in values[len(values) * 2 // 3 :]
    ]
    # Chance is one in 31; one spectrum per phone cannot tell apart what differs in time alone (stops).
    assert np.mean(hits) > 0.3, np.mean(hits)


# ---------------------------------------------------------------------------------------------------- splits


def test_splits_share_neither_speakers_nor_test_attributes() -> None:
    source = section(num_utterances=2000, num_speakers=20)
    planned, hidden = plan_utterances(source), held_out_pairs(0)
    speakers = {s: {u.speaker.name for u in planned if u.speaker.split == s} for s in source.splits}
    assert {split: len(names) for split, names in speakers.items()} == {"train": 16, "dev": 2, "test": 2}
    assert len(set.union(*speakers.values())) == 20
    assert len({u.speaker.voice for u in planned}) == 20
    for u in planned:
        pairs = {(thing.colour, thing.shape) for thing in (u.scene.first, u.scene.second)}
        assert pairs <= hidden if u.speaker.split == "test" else not pairs & hidden
    assert len({u.scene.caption.replace(" is ", " ") for u in planned}) == 2000


def test_every_word_is_seen_in_training_and_test() -> None:
    hidden = held_out_pairs(3)
    assert len(hidden) == len(COLOURS) * len(SHAPES) // 5
    assert {colour for colour, _ in hidden} == set(COLOURS)
    assert {shape for _, shape in hidden} == set(SHAPES)
    assert all(sum(colour == c for c, _ in hidden) < len(SHAPES) for colour in COLOURS)


@pytest.mark.parametrize(
    ("num_speakers", "dev_share", "test_share", "wanted"),
    [
        (3, 0.1, 0.1, (1, 1, 1)),
        (3, 0.49, 0.49, (1, 1, 1)),
        (60, 0.1, 0.2, (42, 6, 12)),
        (10, 0.0, 0.0, (10, 0, 0)),
    ],
)
def test_shares_of_speakers(num_speakers: int, dev_share: float, test_share: float, wanted: tuple[int, ...]) -> None:
    speakers = draw_speakers(
        section(num_utterances=60, num_speakers=num_speakers, dev_share=dev_share, test_share=test_share)
    )
    assert tuple(sum(s.split == split for s in speakers) for split in ("train", "dev", "test")) == wanted


def test_fewer_utterances_than_speakers_still_make_all_splits() -> None:
    planned = plan_utterances(section(num_utterances=3, num_speakers=20))
    assert {u.speaker.split for u in planned} == {"train", "dev", "test"}


def test_only_the_wanted_splits_are_made(tmp_path: Path) -> None:
    rows = synthesise(section(splits=("test",), test_share=0.25), tmp_path)
    assert {row.split for row in rows} == {"test"}
    # Every speaker says one thing.
    assert len(list(tmp_path.rglob("*.flac"))) == len(rows) == NUM // 4
    with pytest.raises(ValueError, match=r"^[^\n]*found no speaker for \['test'\][^\n]*raise[^\n]*$"):
        synthesise(section(splits=("test",), test_share=0.0), tmp_path)


def test_negative_seeds_are_seeds() -> None:
    assert plan_utterances(section(seed=-1)) != plan_utterances(section(seed=0))


# -------------------------------------------------------------------------------------------------- pictures


def test_distractors_are_wrong_captions_of_the_same_words() -> None:
    scene = Scene(Thing("small", "red", "star"), "above", Thing("large", "blue", "heart"))
    assert scene.caption == "a small red star is above a large blue heart"
    assert scene.distractors == (
        "a small red star is below a large blue heart",
        "a small blue star is above a large red heart",
        "a small red heart is above a large blue star",
        "a large blue heart is above a small red star",
    )
    for scene in draw_scenes(50, False, 0):
        assert len({scene.caption, *scene.distractors}) == 5


@pytest.mark.parametrize("held_out", [False, True])
def test_pictures_show_what_is_said(held_out: bool) -> None:
    rng = np.random.default_rng(0)
    for scene in draw_scenes(80, held_out, 1):
        picture = np.asarray(Image.open(io.BytesIO(draw_image(scene, rng)))).astype(int)
        ground = picture[0, 0]
        different = np.abs(picture - ground).max(axis=2) > 0
        border = np.concatenate([different[0], different[-1], different[:, 0], different[:, -1]])
        assert not border.any(), f"clipped: {scene.caption}"
        blobs, num = ndimage.label(different, np.ones((3, 3)))
        assert num == 2, f"overlapping: {scene.caption}"
        centres = np.array(ndimage.center_of_mass(different, blobs, [1, 2]))
        # The colour in the middle of a shape tells which it is; painted within ±10 of its name's.
        inner = [picture[tuple(centre.round().astype(int))] for centre in centres]
        wanted = [COLOURS[thing.colour] for thing in (scene.first, scene.second)]
        order = [int(np.argmin([np.abs(colour - paint).max() for colour in inner])) for paint in wanted]
        assert sorted(order) == [0, 1]
        for i, paint in zip(order, wanted, strict=True):
            assert np.abs(inner[i] - paint).max() <= 10, scene.caption
        down, right = centres[order[0]] - centres[order[1]]
        side = {"above": -down, "below": down, "to the left of": -right, "to the right of": right}
        assert max(side, key=lambda relation: side[relation]) == scene.relation
        # Radii are 9 to 12 pixels for small and 17 to 20 for large; shapes are 1.7 (square, heart) to 2 radii
        # high, and up to 2 pixels are gained at smooth edges: small at most 26, large at least 28.
        for i, thing in zip(order, (scene.first, scene.second), strict=True):
            height = int(np.ptp(np.flatnonzero((blobs == i + 1).any(axis=1)))) + 1
            assert (height > 27) == (thing.size == "large"), (scene.caption, height)


def test_relations_come_in_opposites() -> None:
    assert all(RELATIONS[RELATIONS[relation]] == relation != RELATIONS[relation] for relation in RELATIONS)
