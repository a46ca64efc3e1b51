"""Picture files of every odd kind: what models are shown of them, or why they are refused."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from picture_files import coloured, turned
from PIL import Image

from zppo.data import pictures
from zppo.data.pictures import (
    MAX_PIXELS,
    MOST_ELONGATED,
    PictureError,
    PixelBounds,
    decode,
    picture_header,
    picture_problem,
    plain_bytes,
    read_picture,
    refer,
)
from zppo_protocol.values import PictureReference

CORNERS = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [200, 100, 50]]], np.uint8)
"""Red and green above blue and brown: shows every way of turning."""


def save(file: Path, image: Image.Image, **options: object) -> Path:
    image.save(file, **options)  # type: ignore[arg-type]
    return file


def seen(file: Path) -> np.ndarray:
    """[height, width, 3] uint8: what models are shown of a file."""
    reference = refer(file)
    picture = read_picture(reference)
    assert picture.mode == "RGB"
    assert picture.size == (reference.width, reference.height)
    return np.asarray(picture)


def refusal(file: Path) -> str:
    with pytest.raises(ValueError) as caught:
        refer(file)
    return str(caught.value)


# ---- what is shown -------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["PNG", "WEBP", "BMP", "TIFF", "GIF"])
def test_plain_files_of_every_format_under_any_name(tmp_path: Path, form: str) -> None:
    options = {"lossless": True} if form == "WEBP" else {}
    file = save(tmp_path / "picture.jpg", Image.fromarray(CORNERS), format=form, **options)
    assert np.array_equal(seen(file), CORNERS)


@pytest.mark.parametrize("form", ["a.png", "a.tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_is_turned_as_it_says(tmp_path: Path, orientation: int, form: str) -> None:
    """Against what the EXIF standard says: in which corner the file's first row and column lie."""
    wide = np.repeat(np.repeat(CORNERS, 16, 0), 32, 1)
    file = save(tmp_path / form, Image.fromarray(wide), exif=turned(orientation))
    flips = {
        1: wide,
        2: wide[:, ::-1],
        3: wide[::-1, ::-1],
        4: wide[::-1],
        5: wide.transpose(1, 0, 2),
        6: wide.transpose(1, 0, 2)[:, ::-1],
        7: wide.transpose(1, 0, 2)[::-1, ::-1],
        8: wide.transpose(1, 0, 2)[::-1],
    }
    assert np.array_equal(seen(file), flips[orientation])


def test_sixteen_bits_become_eight(tmp_path: Path) -> None:
    deep = np.array([[0, 255, 256], [32767, 65279, 65535]], np.uint16)
    file = save(tmp_path / "deep.png", Image.fromarray(deep))
    assert np.array_equal(seen(file)[:, :, 0], deep >> 8)
    assert np.array_equal(seen(file)[:, :, 1], deep >> 8)


def test_grey_bits_and_palettes(tmp_path: Path) -> None:
    grey = Image.fromarray(np.array([[0, 128], [200, 255]], np.uint8))
    assert seen(save(tmp_path / "grey.png", grey))[:, :, 2].tolist() == [[0, 128], [200, 255]]
    bits = grey.point(lambda value: 255 * (value > 150)).convert("1")
    assert set(np.unique(seen(save(tmp_path / "bits.png", bits)))) == {0, 255}
    palette = Image.fromarray(CORNERS).quantize(4)
    assert np.array_equal(seen(save(tmp_path / "palette.png", palette)), CORNERS)


def test_what_is_transparent_is_shown_on_white(tmp_path: Path) -> None:
    colours = np.array([[[255, 0, 0, 255], [255, 0, 0, 0], [0, 0, 0, 51]]], np.uint8)
    rgba = Image.fromarray(colours)
    expected = [[[255, 0, 0], [255, 255, 255], [204, 204, 204]]]
    assert seen(save(tmp_path / "alpha.png", rgba)).tolist() == expected
    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    file = save(tmp_path / "palette.png", palette, transparency=0)
    assert seen(file).tolist() == [[[255, 255, 255], [0, 0, 255]]]


def test_inks_become_colours(tmp_path: Path) -> None:
    file = save(tmp_path / "inks.tiff", Image.new("CMYK", (2, 2), (0, 255, 255, 0)))
    assert seen(file)[0, 0].tolist() == [255, 0, 0]
    file = save(tmp_path / "inks.jpg", Image.new("CMYK", (16, 16), (255, 0, 255, 0)))
    assert np.abs(seen(file)[0, 0].astype(int) - [0, 255, 0]).max() <= 4


def test_a_picture_of_one_pixel(tmp_path: Path) -> None:
    file = save(tmp_path / "one.png", Image.new("RGB", (1, 1), "navy"))
    assert seen(file).tolist() == [[[0, 0, 128]]]
    larger = read_picture(refer(file, PixelBounds(least=4096)))
    assert larger.size == (64, 64) and larger.getpixel((32, 32)) == (0, 0, 128)


def test_the_first_of_several_pictures_of_a_camera(tmp_path: Path) -> None:
    first, second = Image.new("RGB", (16, 16), "red"), Image.new("RGB", (16, 16), "blue")
    file = tmp_path / "camera.jpg"
    first.save(file, format="MPO", save_all=True, append_images=[second])
    red, green, blue = seen(file)[0, 0].tolist()
    assert red > 250 and green < 5 and blue < 5


# ---- what is refused -----------------------------------------------------------------------------


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header promises so many pixels, and which holds none."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def test_bombs_are_refused_from_their_header(tmp_path: Path) -> None:
    file = tmp_path / "bomb.png"
    file.write_bytes(bomb(10_001, 10_000))
    assert refusal(file) == f"has more than {MAX_PIXELS} pixels"
    file.write_bytes(bomb(60_000, 60_000))  # here Pillow itself refuses
    assert refusal(file) == f"has more than {MAX_PIXELS} pixels"


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_truncated_file_is_refused(tmp_path: Path, form: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(noise).save(content, format=form)
    file = tmp_path / "torn"
    file.write_bytes(content.getvalue()[: len(content.getvalue()) // 2])
    assert refusal(file).startswith(("is unreadable (", "is not a picture; expected one of PNG,"))


def test_animations_are_refused(tmp_path: Path) -> None:
    first, second = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    for form in ("GIF", "PNG", "WEBP", "TIFF"):
        file = tmp_path / f"moving.{form.lower()}"
        first.save(file, format=form, save_all=True, append_images=[second])
        assert refusal(file) == (
            "has several frames; expected a still picture, or a video (docs/pictures.md)"
        )


def test_pixels_without_a_plain_meaning_are_refused(tmp_path: Path) -> None:
    file = save(tmp_path / "floats.tiff", Image.fromarray(np.ones((2, 2), np.float32)))
    assert refusal(file) == ("has pixels of the kind 'F'; expected grey or colour of 8 or 16 bits")


def test_no_thin_pictures_and_no_other_files(tmp_path: Path) -> None:
    file = save(tmp_path / "line.png", Image.new("RGB", (MOST_ELONGATED + 1, 1)))
    assert refusal(file) == (
        "has 201 × 1 pixels; expected sides of at most 200 to 1, because models are shown no "
        "thinner pictures"
    )
    file.write_text("words")
    assert refusal(file) == ("is not a picture; expected one of PNG, JPEG, WEBP, GIF, BMP, TIFF")
    assert refusal(tmp_path) == "does not exist"


def test_bounds_make_no_picture_that_is_refused_later(tmp_path: Path) -> None:
    """Rounding makes a thin picture thinner, and an enlarged one larger than asked for."""
    line = save(tmp_path / "line.png", Image.new("RGB", (398, 2)))
    assert refer(line).width == 398
    with pytest.raises(ValueError, match="has 282 × 1 pixels; expected sides of at most 200 to 1"):
        refer(line, PixelBounds(most=400))
    with pytest.raises(ValueError, match=f"has more than {MAX_PIXELS} pixels"):
        refer(line, PixelBounds(least=MAX_PIXELS))


def test_a_file_that_may_not_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(file: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(file))

    file = save(tmp_path / "a.png", Image.fromarray(CORNERS))
    monkeypatch.setattr(Path, "read_bytes", denied)
    assert refusal(file) == "cannot be read (Permission denied)"


FORMS = ("JPEG", "WEBP", "GIF", "BMP", "TIFF")


@pytest.mark.filterwarnings("ignore::UserWarning")
@given(
    st.sampled_from(FORMS),
    st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), min_size=1, max_size=4),
)
def test_what_is_referred_to_can_be_read(form: str, damages: list[tuple[int, int]]) -> None:
    """A file that was taken at launch and cannot be shown later would end the run."""
    noise = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(noise).save(content, format=form)
    damaged = bytearray(content.getvalue())
    for place, value in damages:
        damaged[place % len(damaged)] = value
    if picture_problem(bytes(damaged)) is None:
        _, width, height = picture_header(bytes(damaged))
        reference = PictureReference(path="a", sha256="0" * 64, width=width, height=height)
        assert decode(bytes(damaged), reference).size == (width, height)


def test_a_damaged_frame_of_webp_is_found(tmp_path: Path) -> None:
    content = io.BytesIO()
    Image.fromarray(np.repeat(CORNERS, 20, 0)).save(content, format="WEBP", lossless=True)
    damaged = bytearray(content.getvalue())
    damaged[26:] = bytes(255 - value for value in damaged[26:])
    file = tmp_path / "a.webp"
    file.write_bytes(damaged)
    assert refusal(file).startswith("is unreadable (")


@given(st.binary(max_size=64), st.integers(0, 300), st.integers(0, 255))
def test_damaged_bytes_have_a_reason_or_are_a_picture(junk: bytes, place: int, value: int) -> None:
    content = io.BytesIO()
    Image.fromarray(CORNERS).save(content, format="PNG")
    damaged = bytearray(content.getvalue())
    damaged[place % len(damaged)] = value
    for data in (junk, bytes(damaged)):
        problem = picture_problem(data)
        assert problem is None or problem.startswith(("is ", "has "))


# ---- references ----------------------------------------------------------------------------------


def test_a_changed_or_missing_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    reference = coloured(file, "red")
    new = coloured(file, "blue")
    with pytest.raises(PictureError) as caught:
        read_picture(reference)
    assert str(caught.value) == (
        f"the picture {str(file)!r} has changed since the data was read (its SHA-256 is "
        f"{new.sha256[:12]}…, and was {reference.sha256[:12]}…); put the old file back, or begin a "
        "new run"
    )
    file.unlink()
    with pytest.raises(PictureError) as caught:
        read_picture(reference)
    assert str(caught.value) == f"the picture {str(file)!r} does not exist"


def test_a_reference_to_a_huge_size_is_refused(tmp_path: Path) -> None:
    huge = replace(coloured(tmp_path / "a.png", "red"), width=100_000, height=100_000)
    with pytest.raises(PictureError, match=f"has more than {MAX_PIXELS} pixels"):
        read_picture(huge)


def test_the_same_pixels_twice(tmp_path: Path) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    file = save(tmp_path / "noise.jpg", Image.fromarray(noise))
    reference = refer(file, PixelBounds(most=1500))
    assert read_picture(reference).tobytes() == read_picture(reference).tobytes()
    assert reference.width * reference.height <= 1500


def test_plain_files_travel_as_they_are(tmp_path: Path) -> None:
    reference = coloured(tmp_path / "a.png", "red")
    assert plain_bytes(reference) == ("image/png", Path(reference.path).read_bytes())
    file = save(tmp_path / "b.tiff", Image.fromarray(CORNERS))
    kind, content = plain_bytes(refer(file))
    assert kind == "image/png" and np.array_equal(
        np.asarray(Image.open(io.BytesIO(content))), CORNERS
    )


SIDES = st.integers(1, 5000)


@given(SIDES, SIDES, st.integers(1, 10**7) | st.none(), st.integers(1024, 10**7) | st.none())
def test_bounds_keep_area_and_shape(
    width: int, height: int, least: int | None, most: int | None
) -> None:
    if max(width, height) > MOST_ELONGATED * min(width, height):
        return
    if least is not None and most is not None and least > most:
        least, most = None, most
    w, h = PixelBounds(least, most).apply(width, height)
    area = width * height
    if most is not None and area > most:
        assert w * h <= most and w <= width and h <= height
    elif least is not None and area < least:
        assert w * h >= least and w >= width and h >= height
    else:
        assert (w, h) == (width, height)
    scale = (w * h / area) ** 0.5
    assert abs(w - width * scale) <= 1 + w * 0.5 / min(w, h) + 1
    assert pictures.PixelBounds().apply(w, h) == (w, h)
