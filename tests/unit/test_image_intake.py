"""What of images is refused before it is decoded, while it is, and what is taken as it is."""

from __future__ import annotations

import io
import struct
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sonorant.data.corpus import Row
from sonorant.data.intake import (
    IMAGE_BYTES,
    ImageIntake,
    Limits,
    RefusalError,
    file_state,
    plan_shard,
    read_image,
)

PIXELS = 50_000_000


def picture(form: str, mode: str = "RGB", side: int = 24, **how: Any) -> bytes:
    """A noisy picture's file."""
    noise = np.random.default_rng(0).integers(0, 255, (side, side, 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(file, form, **how)
    return file.getvalue()


def png_header(width: int, height: int) -> bytes:
    """The first bytes of a PNG that claims so many pixels, and a little of them."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


def regions(**arrays: Any) -> bytes:
    """An .npz of three good regions, changed by `arrays`; None leaves one out."""
    good = {"features": np.ones((3, 8), np.float32), "boxes": np.tile(np.float32([0, 0, 1, 1]), (3, 1))}
    file = io.BytesIO()
    np.savez(file, **{name: array for name, array in (good | arrays).items() if array is not None})
    return file.getvalue()


def refusal(tmp_path: Path, name: str, content: bytes, max_pixels: int = PIXELS) -> tuple[str, str]:
    """Why an image of this name and content is not taken."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RefusalError) as error:
        read_image(tmp_path / name, max_pixels)
    assert "\n" not in error.value.detail
    return error.value.reason, error.value.detail


# ------------------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.png", picture("PNG")),
        ("grey.png", picture("PNG", "L")),
        ("clear.png", picture("PNG", "RGBA")),
        ("coloured.gif", picture("GIF", "P")),
        ("moving.gif", picture("GIF", "P", save_all=True, append_images=[Image.new("P", (24, 24), 3)])),
        ("x.jpg", picture("JPEG")),
        ("print.jpg", picture("JPEG", "CMYK")),
        ("x.webp", picture("WEBP")),
        ("black.tif", picture("TIFF", "1")),
        ("misnamed.jpg", picture("PNG")),
    ],
)
def test_pictures_are_taken_as_they_are(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert read_image(tmp_path / name, PIXELS) == content
    assert Image.open(io.BytesIO(content)).convert("RGB").size == (24, 24)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_truncated_pictures(tmp_path: Path, form: str, share: float) -> None:
    whole = picture(form, side=64)
    assert refusal(tmp_path, "x", whole[: int(len(whole) * share)])[0] == "unreadable image"


def test_what_is_no_picture(tmp_path: Path) -> None:
    assert refusal(tmp_path, "x.jpg", b"")[0] == "unreadable image"
    assert refusal(tmp_path, "x.jpg", b"<html>404</html>") == (
        "unreadable image",
        "x.jpg: none of BMP, GIF, JPEG, PNG, PPM, TIFF, WEBP",
    )
    # Pillow would start Ghostscript.
    assert refusal(tmp_path, "x.eps", picture("EPS"))[0] == "unreadable image"
    assert refusal(tmp_path, "x.tif", picture("TIFF", "F")) == (
        "unreadable image",
        "x.tif: mode F, wanted one of at most 8 bits a channel",
    )
    with pytest.raises(RefusalError, match="missing image"):
        read_image(tmp_path / "no.png", PIXELS)
    with pytest.raises(RefusalError, match="missing image"):
        read_image(tmp_path, PIXELS)


@pytest.mark.parametrize(("width", "height"), [(10_000, 9_500), (20_000, 20_000), (2**31 - 1, 2**31 - 1)])
def test_a_bomb_is_refused_by_its_header(tmp_path: Path, width: int, height: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reason, _ = refusal(tmp_path, "bomb.png", png_header(width, height))
    assert reason == "oversized image"


def test_pixels_up_to_the_limit(tmp_path: Path) -> None:
    content = picture("PNG", side=24)
    assert refusal(tmp_path, "x.png", content, 24 * 24 - 1) == (
        "oversized image",
        "x.png: 24 × 24 pixels, wanted at most 575",
    )
    assert read_image(tmp_path / "x.png", 24 * 24) == content


@pytest.mark.parametrize(
    ("name", "max_pixels", "max_bytes"),
    [("x.npz", PIXELS, IMAGE_BYTES), ("x.png", 1, IMAGE_BYTES), ("x.png", PIXELS, 4 * PIXELS)],
)
def test_a_file_beyond_the_limit_is_not_read(tmp_path: Path, name: str, max_pixels: int, max_bytes: int) -> None:
    with (tmp_path / name).open("wb") as file:
        file.truncate(max_bytes + 1)
    with pytest.raises(RefusalError, match=f"{name}: {max_bytes + 1} bytes, wanted at most {max_bytes}"):
        read_image(tmp_path / name, max_pixels)


# -------------------------------------------------------------------------------------------------- regions


def test_regions_are_taken_as_they_are(tmp_path: Path) -> None:
    for content in (regions(), regions(boxes=np.full((3, 4), 1 + 5e-6)), regions(image=np.int64([7]))):
        (tmp_path / "x.npz").write_bytes(content)
        assert read_image(tmp_path / "x.npz", PIXELS) == content


@pytest.mark.parametrize(
    ("content", "detail"),
    [
        (b"", "not a zip file"),
        (picture("PNG"), "not a zip file"),
        (regions()[:200], "not a zip file"),
        (regions(boxes=None), "boxes is not a file in the archive"),
        (regions(features=np.array([{}] * 3, object)), "Object arrays cannot be loaded"),
        (regions(features=np.ones((3, 8), np.int64)), "features (3, 8) int64"),
        (regions(features=np.float32(1)), "features () float32"),
        (regions(features=np.ones((0, 8), np.float32), boxes=np.ones((0, 4), np.float32)), "features (0, 8)"),
        (regions(boxes=np.ones((2, 4), np.float32)), "boxes (2, 4) float32"),
        (regions(boxes=np.ones((3, 5), np.float32)), "boxes (3, 5) float32"),
        (regions(features=np.full((3, 8), np.nan)), "NaN or infinity"),
        (regions(boxes=np.full((3, 4), np.nan)), "not scaled to [0, 1]"),
        (regions(boxes=np.full((3, 4), 224.0)), "not scaled to [0, 1]"),
    ],
)
def test_what_are_no_regions(tmp_path: Path, content: bytes, detail: str) -> None:
    reason, found = refusal(tmp_path, "x.npz", content)
    assert reason == "unreadable image"
    assert detail in found


def test_arrays_that_unpack_to_more_than_a_file_may_be(tmp_path: Path) -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("features.npy", bytes(IMAGE_BYTES + 1))
    assert len(file.getvalue()) < IMAGE_BYTES // 100
    assert refusal(tmp_path, "x.npz", file.getvalue())[0] == "oversized image"


def test_an_array_whose_header_lies(tmp_path: Path) -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in ("features", "boxes"):
            header = io.BytesIO()
            np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (10**14, 4)})
            archive.writestr(f"{name}.npy", header.getvalue())
    assert refusal(tmp_path, "x.npz", file.getvalue())[0] in ("oversized image", "unreadable image")


# -------------------------------------------------------------------------------------------------- storing


def test_an_image_of_many_rows_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "shard").mkdir()
    (tmp_path / "x.PNG").write_bytes(picture("PNG"))
    images = ImageIntake(tmp_path / "shard", PIXELS)
    name = images.take(tmp_path / "x.PNG")
    assert name.endswith(".png")
    assert (tmp_path / "shard" / name).read_bytes() == picture("PNG")
    with pytest.raises(RefusalError, match="missing image"):
        images.take(tmp_path / "y.png")
    # Were it read again, it would be another.
    (tmp_path / "x.PNG").write_bytes(picture("PNG", side=25))
    assert images.take(tmp_path / "x.PNG") == name
    assert len(list((tmp_path / "shard").iterdir())) == 1


def test_work_is_done_again_where_the_limit_or_the_image_changes(tmp_path: Path) -> None:
    image = tmp_path / "x.png"
    image.write_bytes(picture("PNG"))
    row = Row(id="x", source="s", speaker="a", path=tmp_path / "x.wav", image=image)
    first = plan_shard(tmp_path, (row,), Limits(0.4, 30.0, 100)).folder
    assert plan_shard(tmp_path, (row,), Limits(0.4, 30.0, 100)).folder == first
    assert plan_shard(tmp_path, (row,), Limits(0.4, 30.0, 101)).folder != first
    before = file_state(image)
    image.write_bytes(picture("PNG", side=25))
    assert file_state(image) != before
    assert plan_shard(tmp_path, (row,), Limits(0.4, 30.0, 100)).folder != first
