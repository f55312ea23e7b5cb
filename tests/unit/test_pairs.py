"""Pictures: whose image is whose, what of a file is seen, and what a network that stands still saw once."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from sonorant.config import ImageConfig
from sonorant.data import pairs
from sonorant.data.corpus import Utterance
from sonorant.data.pairs import Pictures, read_square
from sonorant.models.images import Foreign
from sonorant.steps import pictures as seen_pictures
from sonorant.steps.pictures import SEEN, open_pictures

DIGITS = Path(__file__).resolve().parents[3] / "shared" / "data" / "fsdd_digits" / "images"


def utterance(name: str, image: Path | None) -> Utterance:
    """One that speaks of an image, or of none."""
    return Utterance(id=name, split="train", source="s", speaker="p", num_samples=16_000, path=Path("-"), image=image)


def noise(side: int, seed: int = 0, height: int | None = None) -> NDArray[np.uint8]:
    """Random colours, (H, W, 3)."""
    values = np.random.default_rng(seed).integers(0, 256, (height or side, side, 3))
    return values.astype(np.uint8)


def file_of(picture: Image.Image, form: str = "PNG", **how: Any) -> bytes:
    """A picture's file."""
    file = io.BytesIO()
    picture.save(file, form, **how)
    return file.getvalue()


def write_pictures(folder: Path, count: int, side: int = 12) -> list[Utterance]:
    """Two utterances of each of so many pictures of noise, and one of none."""
    folder.mkdir(exist_ok=True)
    for index in range(count):
        Image.fromarray(noise(side, index)).save(folder / f"{index}.png")
    spoken = [utterance(f"{index}-{take}", folder / f"{index}.png") for take in range(2) for index in range(count)]
    return [utterance("silent", None), *reversed(spoken)]


def write_regions(path: Path, count: int = 3, **arrays: Any) -> Utterance:
    """An utterance of an .npz of regions, changed by `arrays`; None leaves one out."""
    rng = np.random.default_rng(0)
    good = {"features": rng.standard_normal((count, 5)).astype(np.float32), "boxes": rng.random((count, 4))}
    np.savez(path, **{name: array for name, array in (good | arrays).items() if array is not None})
    return utterance(path.stem, path)


REGIONS = ImageConfig(kind="regions", region_dim=5)


# -------------------------------------------------------------------------------------------------- whose is whose


def test_an_image_has_one_number_whoever_speaks_of_it(tmp_path: Path) -> None:
    utterances = write_pictures(tmp_path, 3)
    pictures = Pictures(utterances, ImageConfig(side=12), 12)
    assert len(pictures) == 3
    assert pictures.names == ["0.png", "1.png", "2.png"]
    assert [pictures.number(each) for each in utterances] == [-1, 2, 1, 0, 2, 1, 0]
    (pixels,) = pictures.read([utterances[1], utterances[3], utterances[4]])
    assert pixels.shape == (3, 3, 12, 12)
    assert pixels.dtype == torch.uint8
    # At the side it has, a picture is what its file says.
    for row, number in zip(pixels, (2, 0, 2), strict=True):
        assert np.array_equal(row.numpy().transpose(1, 2, 0), noise(12, number))
    assert pictures.read([]) == ()


def test_numbers_do_not_depend_on_the_order_of_utterances(tmp_path: Path) -> None:
    utterances = write_pictures(tmp_path, 4)
    one, two = (Pictures(order, ImageConfig(side=12), 12) for order in (utterances, utterances[::-1]))
    assert one.numbers == two.numbers


def test_what_is_kept_in_memory_is_bounded_and_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    utterances = write_pictures(tmp_path, 4)
    wanted = Pictures(utterances, ImageConfig(side=12), 12).rows(range(4))[0]
    monkeypatch.setattr(pairs, "CACHE_BYTES", 2 * 3 * 12 * 12 + 5)
    pictures = Pictures(utterances, ImageConfig(side=12), 12)
    assert torch.equal(pictures.rows(range(4))[0], wanted)
    assert torch.equal(pictures.rows(range(4))[0], wanted)
    for path in tmp_path.glob("*.png"):
        path.unlink()
    assert torch.equal(pictures.rows([0, 1])[0], wanted[:2])
    with pytest.raises(FileNotFoundError):
        pictures.rows([2])


# ------------------------------------------------------------------------------------------------------- pixels


def test_a_wide_picture_is_cut_around_its_middle() -> None:
    wide = noise(30, height=12)
    assert np.array_equal(read_square(file_of(Image.fromarray(wide)), "x", 12), wide[:, 9:21].transpose(2, 0, 1))
    tall = wide.transpose(1, 0, 2)
    assert np.array_equal(
        read_square(file_of(Image.fromarray(tall)), "x", 12), wide[:, 9:21].transpose(1, 0, 2).transpose(2, 0, 1)
    )


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "I;16"])
def test_any_mode_becomes_three_colours(mode: str) -> None:
    grey = noise(12)[:, :, 0]
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    picture = deep if mode == "I;16" else Image.fromarray(noise(12)).convert(mode)
    assert picture.mode == mode
    pixels = read_square(file_of(picture), "x", 12)
    assert pixels.shape == (3, 12, 12)
    assert pixels.std() > 10
    if mode == "RGBA":
        assert np.array_equal(pixels, noise(12).transpose(2, 0, 1))
    if mode == "I;16":
        assert np.array_equal(pixels, np.stack([grey] * 3))


def test_a_picture_stands_as_its_camera_was_held() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90° clockwise
    turned = read_square(file_of(Image.fromarray(noise(12)), exif=exif), "x", 12)
    assert np.array_equal(turned, np.rot90(noise(12), -1).transpose(2, 0, 1))


@pytest.mark.skipif(not DIGITS.is_dir(), reason="shared/data/fsdd_digits is missing")
def test_a_real_digit_of_8_pixels_is_seen_at_24() -> None:
    path = min(DIGITS.glob("*.png"))
    pixels = read_square(path.read_bytes(), path.name, 24)
    with Image.open(path) as picture:
        small = np.asarray(picture.convert("L"), np.float64)
    assert small.shape == (8, 8)
    assert np.array_equal(pixels[0], pixels[2])
    blocks = pixels[0].astype(np.float64).reshape(8, 3, 8, 3).mean((1, 3))
    assert np.corrcoef(blocks.ravel(), small.ravel())[0, 1] > 0.95


@pytest.mark.parametrize("content", [b"", b"no picture", file_of(Image.fromarray(noise(40)))[:500]])
def test_what_is_no_picture_is_refused_on_one_line(content: bytes) -> None:
    with pytest.raises(ValueError, match=r"image x\.png: found no picture that can be read") as caught:
        read_square(content, "x.png", 12)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------------ regions


def test_regions_are_features_and_boxes(tmp_path: Path) -> None:
    utterances = [write_regions(tmp_path / f"{name}.npz") for name in "ab"]
    features, boxes = Pictures(utterances, REGIONS, 0).read(utterances)
    assert (features.shape, boxes.shape) == ((2, 3, 5), (2, 3, 4))
    assert features.dtype == boxes.dtype == torch.float32
    with np.load(tmp_path / "b.npz") as arrays:
        assert np.array_equal(features[1].numpy(), arrays["features"])


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"boxes": None}, "found no features and boxes"),
        ({"features": np.array([{"a": 1}], dtype=object)}, "found no features and boxes"),
        ({"features": np.ones((3, 6))}, r"features \(3, 6\).*wanted \(R, 5\)"),
        ({"boxes": np.ones((2, 4))}, r"boxes \(2, 4\)"),
    ],
    ids=["missing", "pickle", "width", "count"],
)
def test_what_are_no_regions_is_refused_on_one_line(arrays: dict[str, Any], words: str, tmp_path: Path) -> None:
    spoken = write_regions(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=words) as caught:
        Pictures([spoken], REGIONS, 0).read([spoken])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"no zip", b"PK\x03\x04 cut"])
def test_no_archive_is_refused_on_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(content)
    spoken = utterance("a", tmp_path / "a.npz")
    with pytest.raises(ValueError, match="found no features and boxes") as caught:
        Pictures([spoken], REGIONS, 0).read([spoken])
    assert "\n" not in str(caught.value)


def test_images_of_different_numbers_of_regions_are_refused(tmp_path: Path) -> None:
    utterances = [write_regions(tmp_path / "a.npz"), write_regions(tmp_path / "b.npz", 4)]
    with pytest.raises(ValueError, match=r"image b\.npz: found 4 regions, wanted 3"):
        Pictures(utterances, REGIONS, 0).read(utterances)


# ------------------------------------------------------------------------------------------------- seen only once


@pytest.fixture
def vision(tmp_path: Path) -> Path:
    """A transformers model with random weights."""
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 12}
    ViTModel(ViTConfig(**shape, intermediate_size=32, patch_size=6)).save_pretrained(tmp_path / "vision")
    return tmp_path / "vision"


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images each look of a model was at."""
    counts: list[int] = []
    look = Foreign.forward

    def counted(self: Foreign, pixels_I3SS: torch.Tensor) -> torch.Tensor:
        counts.append(len(pixels_I3SS))
        return look(self, pixels_I3SS)

    monkeypatch.setattr(Foreign, "forward", counted)
    return counts


def test_a_model_that_stands_still_sees_each_image_once(
    vision: Path, tmp_path: Path, looks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seen_pictures, "AT_ONCE", 2)
    utterances = write_pictures(tmp_path / "images", 5)
    still = ImageConfig(kind="transformers", path=vision, trained=False)
    first = open_pictures(utterances, still, tmp_path / "cache")
    assert looks == [2, 2, 1]
    again = open_pictures(utterances, still, tmp_path / "cache")
    assert looks == [2, 2, 1]
    assert torch.equal(first.rows(range(5))[0], again.rows(range(5))[0])
    (vectors,) = again.read(utterances[1:3])
    assert torch.equal(vectors, again.rows([4, 3])[0])
    # And it is what the model makes of the images.
    trained = open_pictures(utterances, ImageConfig(kind="transformers", path=vision), tmp_path / "cache")
    from sonorant.models.images import load_foreign

    with torch.inference_mode():
        wanted = load_foreign(vision)(*trained.rows([3]))
    assert torch.allclose(again.rows([3])[0], wanted, atol=1e-5)


@pytest.mark.parametrize("change", ["model", "image", "cut", "killed"])
def test_what_was_kept_of_others_is_not_used(change: str, vision: Path, tmp_path: Path, looks: list[int]) -> None:
    utterances = write_pictures(tmp_path / "images", 3)
    still = ImageConfig(kind="transformers", path=vision, trained=False)
    cache = tmp_path / "cache"
    wanted = open_pictures(utterances, still, cache).rows(range(3))[0]
    if change == "model":
        described = json.loads((vision / "config.json").read_text())
        (vision / "config.json").write_text(json.dumps({**described, "layer_norm_eps": 1e-3}))
    elif change == "image":
        utterances = write_pictures(tmp_path / "images", 4)
    elif change == "cut":
        (cache / SEEN).write_bytes((cache / SEEN).read_bytes()[:150])
    else:
        # Killed before it was whole.
        (cache / SEEN).write_bytes(b"")
        (cache / "seen.json").unlink()
    looks.clear()
    found = open_pictures(utterances, still, cache).rows(range(3))[0]
    assert sum(looks) == (4 if change == "image" else 3)
    # Sums of float32 in another order.
    assert torch.allclose(found, wanted, atol=1e-5) == (change != "model")
