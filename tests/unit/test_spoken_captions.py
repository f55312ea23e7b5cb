"""Spoken captions of images in the field's JSON layouts, as rows, with the splits that their files say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sonorant.config import ManifestSource, Part
from sonorant.config.prepare import CaptionFile, SpokenCaptionsSource
from sonorant.data.assembly import choose_splits
from sonorant.data.corpus import Refused, Row
from sonorant.data.sources import Entry, read_source

COCO = [
    {
        "image": "val2014/a.jpg",
        "captions": [
            {"text": "A CAT", "speaker": "m1", "uttid": "m1-1", "wav": "wavs/val/0/m1-1.wav"},
            {"text": "ONE CAT", "speaker": "m2", "uttid": "m2-1", "wav": "wavs/val/0/m2-1.wav"},
        ],
    },
    {
        "image": "val2014/b.jpg",
        "captions": [{"text": "A DOG", "speaker": "m1", "uttid": "m1-2", "wav": "wavs/val/1/m1-2.wav"}],
    },
]
PLACES = [
    {"uttid": "A1_GSUN_1", "speaker": "A1", "asr_text": "a hall", "wav": "wavs/1/utt_1.wav", "image": "h/hall/1.jpg"},
    {"uttid": 7, "speaker": 8, "asr_text": "", "wav": "wavs/1/utt_2.wav", "image": "h/hall/2.jpg"},
]


def source_of(folder: Path, *files: tuple[str, Any, str | None], **fields: Any) -> SpokenCaptionsSource:
    """A source of these files: name, content, split."""
    named = []
    for name, content, split in files:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        named.append({"name": name, "split": split})
    return SpokenCaptionsSource.model_validate({"name": "s", "path": folder, "files": named, **fields})


def entries_of(source: SpokenCaptionsSource) -> list[Entry]:
    """All that a source offers."""
    return read_source(source, source.path, 1, lambda _done, _total: None, Part())


def rows_of(source: SpokenCaptionsSource) -> list[Row]:
    """A source's rows, all of them good."""
    entries = entries_of(source)
    assert not [entry for entry in entries if isinstance(entry, Refused)]
    return [entry for entry in entries if isinstance(entry, Row)]


# ------------------------------------------------------------------------------------------------- layouts


def test_an_image_with_several_captions(tmp_path: Path) -> None:
    (tmp_path / "mscoco").mkdir()
    source = source_of(tmp_path, ("SpokenCOCO_val.json", {"data": COCO}, "dev"), images="mscoco")
    first, second, third = rows_of(source)
    assert first == Row(
        id="m1-1",
        source="s",
        speaker="m1",
        path=tmp_path / "wavs/val/0/m1-1.wav",
        split="dev",
        text="A CAT",
        image=tmp_path / "mscoco/val2014/a.jpg",
    )
    assert (second.id, second.image) == ("m2-1", first.image)
    assert (third.id, third.image) == ("m1-2", tmp_path / "mscoco/val2014/b.jpg")


def test_one_caption_an_item(tmp_path: Path) -> None:
    captions = [{"image": item["image"], "caption": one} for item in COCO for one in item["captions"]]
    rolled = rows_of(source_of(tmp_path, ("a.json", {"data": COCO}, "dev")))
    assert rows_of(source_of(tmp_path, ("b.json", {"data": captions}, "dev"))) == rolled


def test_flat_captions_with_folders_of_their_own(tmp_path: Path) -> None:
    pictures = tmp_path / "elsewhere"
    pictures.mkdir()
    (tmp_path / "distro").mkdir()
    content = {"image_base_path": str(pictures), "audio_base_path": "distro", "data": PLACES}
    first, second = rows_of(source_of(tmp_path, ("metadata/train.json", content, None)))
    assert (first.path, first.image) == (tmp_path / "distro/wavs/1/utt_1.wav", pictures / "h/hall/1.jpg")
    assert (first.text, first.split) == ("a hall", None)
    assert (second.id, second.speaker) == ("7", "8")
    # What the source says goes before what the file says: its author's folders are seldom the reader's.
    content |= {"audio_base_path": "/data/of/the/author"}
    source = source_of(tmp_path, ("metadata/train.json", content, None), audio="distro")
    assert rows_of(source) == [first, second]


def karpathy(tmp_path: Path, **fields: Any) -> SpokenCaptionsSource:
    """Flickr8k as it is published: Karpathy's splits and texts, and the recordings' own lists."""
    content = {
        "dataset": "flickr8k",
        "images": [
            {"filename": "x.jpg", "split": "val", "sentences": [{"raw": "A dog ."}, {"raw": "A black dog ."}]},
            {"filename": "y.jpg", "split": "test", "sentences": [{"raw": "A child ."}]},
        ],
    }
    audio = tmp_path / "flickr_audio"
    audio.mkdir(exist_ok=True)
    (audio / "wav2capt.txt").write_text("x_1.wav x.jpg #1\nx_0.wav x.jpg #0\ny_0.wav y.jpg #0\nz_0.wav z.jpg #0\n")
    (audio / "wav2spk.txt").write_text("x_0.wav 4\nx_1.wav 12\ny_0.wav 4\n")
    return source_of(tmp_path, ("dataset.json", content, None), audio="flickr_audio", **fields)


def test_karpathys_flickr8k(tmp_path: Path) -> None:
    (tmp_path / "Flicker8k_Dataset").mkdir()
    first, second, third = rows_of(karpathy(tmp_path, images="Flicker8k_Dataset"))
    assert first == Row(
        id="x_1",
        source="s",
        speaker="12",
        path=tmp_path / "flickr_audio/wavs/x_1.wav",
        split="dev",
        text="A black dog .",
        image=tmp_path / "Flicker8k_Dataset/x.jpg",
    )
    assert (second.id, second.text, second.speaker) == ("x_0", "A dog .", "4")
    assert (third.split, third.text) == ("test", "A child .")


def test_karpathys_flickr8k_without_its_lists(tmp_path: Path) -> None:
    source = karpathy(tmp_path)
    (tmp_path / "flickr_audio/wav2spk.txt").write_text("x_0.wav 4\nx_1.wav 12\n")
    refused = [entry for entry in entries_of(source) if isinstance(entry, Refused)]
    assert [(one.id, one.path, one.detail) for one in refused] == [
        ("y_0", "dataset.json:images[1] y_0.wav", "speaker: Field required")
    ]
    (tmp_path / "flickr_audio/wav2capt.txt").write_text("x_0.wav x.jpg #0\nx_1.wav x.jpg\n")
    with pytest.raises(ValueError, match=r"wav2capt\.txt:2: found 2 words, wanted 3"):
        entries_of(source)
    (tmp_path / "flickr_audio/wav2capt.txt").unlink()
    with pytest.raises(ValueError, match="set `audio` of the source"):
        entries_of(source)


# ------------------------------------------------------------------------------------------------- refusals

GOOD = {"uttid": "u", "speaker": "a", "wav": "u.wav", "image": "u.jpg"}


@pytest.mark.parametrize(
    ("items", "place", "detail"),
    [
        ([{**GOOD, "uttid": None}], "data[0]", "uttid: "),
        ([{key: GOOD[key] for key in GOOD if key != "uttid"}], "data[0]", "uttid: Field required"),
        ([{key: GOOD[key] for key in GOOD if key != "speaker"}], "data[0]", "speaker: Field required"),
        ([{**GOOD, "speaker": ""}], "data[0]", "speaker: "),
        ([{**GOOD, "split": "validation"}], "data[0]", "split: "),
        ([{**GOOD, "split": "test"}], "data[0]", "split: 'test', wanted train"),
        (["u.wav"], "data[0]", "row: "),
        ([{"image": "u.jpg", "captions": [GOOD, 3]}], "data[0].captions[1]", "row: "),
        ([{"image": "u.jpg", "captions": None}], "data[0].captions", "row: "),
        ([{"captions": [{key: GOOD[key] for key in GOOD if key != "image"}]}], "data[0].captions[0]", "image: "),
    ],
)
def test_a_broken_caption_is_refused_by_its_place(tmp_path: Path, items: list[Any], place: str, detail: str) -> None:
    entries = entries_of(source_of(tmp_path, ("t.json", {"data": items}, "train")))
    [refused] = [entry for entry in entries if isinstance(entry, Refused)]
    assert (refused.reason, refused.path) == ("broken row", f"t.json:{place}")
    assert refused.detail.startswith(detail)
    assert "\n" not in refused.detail


def test_a_broken_image_is_refused_by_its_place(tmp_path: Path) -> None:
    source = karpathy(tmp_path)
    content = json.loads((tmp_path / "dataset.json").read_text())
    del content["images"][0]["split"]
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    refused, row = entries_of(source)
    assert isinstance(refused, Refused)
    assert (refused.path, refused.detail) == ("dataset.json:images[0]", "split: Field required")
    assert isinstance(row, Row)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "found no JSON"),
        ([], "found a list in"),
        ({"annotations": []}, r"found the keys \['annotations'\]"),
        ({"data": {}}, r"found the keys \['data'\]"),
        ({"data": []}, "found no utterance"),
        ({"data": [GOOD], "audio_base_path": "/no/such/folder"}, "as audio_base_path of t.json says.*set `audio`"),
        ({"data": [GOOD], "image_base_path": 3}, "found image_base_path 3"),
    ],
)
def test_files_that_are_no_spoken_captions(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        entries_of(source_of(tmp_path, ("t.json", content, None)))
    assert "\n" not in str(error.value)


def test_paths_that_lead_nowhere(tmp_path: Path) -> None:
    source = source_of(tmp_path, ("t.json", {"data": [GOOD]}, None))
    missing = source.model_copy(update={"files": (CaptionFile(name=Path("train.json")),)})
    with pytest.raises(ValueError, match=r"found no file .*train\.json"):
        entries_of(missing)
    with pytest.raises(ValueError, match="give the folder"):
        entries_of(source.model_copy(update={"path": tmp_path / "t.json"}))
    with pytest.raises(ValueError, match="as its section says"):
        entries_of(source.model_copy(update={"images": Path("nowhere")}))


# --------------------------------------------------------------------------------------------------- splits


def spread(folder: Path, **fields: Any) -> SpokenCaptionsSource:
    """Twenty images, each described by the same two speakers, half of them for training."""
    items = [
        {**GOOD, "uttid": f"{image}-{speaker}", "speaker": speaker, "image": f"{image}.jpg"}
        for image in range(20)
        for speaker in ("ann", "bob")
    ]
    files = (("train.json", {"data": items[:20]}, "train"), ("test.json", {"data": items[20:]}, "test"))
    return source_of(folder, *files, **fields)


def chosen(source: SpokenCaptionsSource, seed: int = 0) -> list[Row]:
    """The rows that are kept, with their splits."""
    return [entry for entry in choose_splits(entries_of(source), source, seed) if isinstance(entry, Row)]


def test_official_splits_that_share_speakers_are_asked_for(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"speaker 'ann' in train and in test .*or set split_by: image"):
        chosen(spread(tmp_path))
    rows = chosen(spread(tmp_path, split_by="image"))
    assert [row.split for row in rows] == ["train"] * 20 + ["test"] * 20
    assert [row.split for row in chosen(spread(tmp_path, split_by="image", splits=["test"]))] == ["test"] * 20


def test_an_image_in_two_official_splits_is_an_error(tmp_path: Path) -> None:
    source = spread(tmp_path, split_by="image")
    content = json.loads((tmp_path / "test.json").read_text())
    content["data"][3]["image"] = "0.jpg"
    (tmp_path / "test.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"found image '0\.jpg' in train and in test \(11-bob\)"):
        chosen(source)


def test_splits_are_drawn_by_image(tmp_path: Path) -> None:
    source = spread(tmp_path, split_by="image", dev_share=0.2, test_share=0.3)
    source = source.model_copy(update={"files": tuple(CaptionFile(name=file.name) for file in source.files)})
    rows = chosen(source)
    assert sorted({(row.image, row.split) for row in rows}) == sorted(
        {row.image: (row.image, row.split) for row in rows}.values()
    )
    counts = {split: sum(row.split == split for row in rows) for split in ("train", "dev", "test")}
    assert counts == {"train": 20, "dev": 8, "test": 12}
    assert {row.speaker for row in rows if row.split == "test"} == {"ann", "bob"}
    # Wherever the source lies, the same images are drawn.
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    assert [row.split for row in chosen(source.model_copy(update={"path": moved}))] == [row.split for row in rows]


def test_a_manifest_is_split_by_image_too(tmp_path: Path) -> None:
    lines = [
        {"id": f"u{i}", "path": "u.wav", "speaker": "ann", "split": split, "image": image}
        for i, (split, image) in enumerate((("train", "a.png"), ("test", "b.png"), ("dev", None), ("train", None)))
    ]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, lines)))
    source = ManifestSource(name="m", path=tmp_path / "m.jsonl", split_by="image")
    entries = read_source(source, tmp_path, 1, lambda _done, _total: None, Part())
    assert [entry.split for entry in choose_splits(entries, source, 0) if isinstance(entry, Row)] == [
        "train",
        "test",
        "dev",
        "train",
    ]
