"""Images in and out: every accepted form, exact round trips, files whole or not at all."""

import io
import os
import stat
import struct
import threading
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from p2pz.images import (
    as_list,
    atomic_path,
    check_image_path,
    psnr,
    read_image,
    same_size_groups,
    save_image,
    to_original_size,
    to_pictures,
    to_tensor,
    working_size,
)


@pytest.fixture
def pixels():
    """`[20, 24, 3]` uint8, all different rows and columns."""
    return np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)


FORMS = {
    "png": lambda pixels, path: Image.fromarray(pixels).save(path / "a.png") or path / "a.png",
    "name": lambda pixels, path: Image.fromarray(pixels).save(path / "a.png") or str(path / "a.png"),
    "picture": lambda pixels, path: Image.fromarray(pixels),
    "uint8": lambda pixels, path: pixels,
    "float64": lambda pixels, path: pixels / 255,
    "float32": lambda pixels, path: pixels.astype(np.float32) / 255,
    "opaque": lambda pixels, path: np.dstack([pixels, np.full((20, 24), 255, np.uint8)]),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_reads_the_same_pixels(form, pixels, tmp_path):
    picture = read_image(FORMS[form](pixels, tmp_path))
    assert picture.mode == "RGB" and np.array_equal(picture, pixels)


def test_grey_becomes_three_equal_channels(pixels):
    grey = pixels[..., 0]
    for image in (grey, grey / 255, Image.fromarray(grey), Image.fromarray(np.dstack([grey, 0 * grey + 255]), "LA")):
        assert np.array_equal(read_image(image), np.repeat(grey[..., None], 3, axis=2))


def test_sixteen_bit_grey_keeps_its_brightness(tmp_path):
    levels = np.arange(400, dtype=np.uint16).reshape(20, 20) * 164  # 0 to 65436
    Image.fromarray(levels).save(tmp_path / "a.png")
    read = np.asarray(read_image(tmp_path / "a.png"))
    assert np.abs(read - (levels / 65535 * 255)[..., None]).max() <= 0.51


def png_of_16_bits(levels, kind):
    """A PNG file of `[H, W, channels]` 16-bit levels, which PIL cannot write; `kind` is the format's colour type."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", levels.shape[1], levels.shape[0], 16, kind, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def tiff_of_16_bits(levels):
    """A TIFF file of `[H, W, 3]` 16-bit levels."""
    height, width, _ = levels.shape
    data, count = levels.astype("<u2").tobytes(), 9
    behind = 8 + 2 + 12 * count + 4
    tags = [(256, 3, 1, width), (257, 3, 1, height), (258, 3, 3, behind), (259, 3, 1, 1), (262, 3, 1, 2)]
    tags += [(273, 4, 1, behind + 6), (277, 3, 1, 3), (278, 3, 1, height), (279, 4, 1, len(data))]
    table = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return b"II*\0" + struct.pack("<IH", 8, count) + table + struct.pack("<IHHH", 0, 16, 16, 16) + data


@pytest.mark.parametrize("form", ["png", "png with alpha", "tiff", "array"])
def test_sixteen_bit_colours_keep_their_brightness(form, tmp_path):
    levels = np.random.default_rng(0).integers(0, 65536, (20, 24, 3), dtype=np.uint16)
    image = tmp_path / "a.image"
    if form == "png":
        image.write_bytes(png_of_16_bits(levels, 2))
    elif form == "png with alpha":
        image.write_bytes(png_of_16_bits(np.dstack([levels, np.full((20, 24), 65535, np.uint16)]), 6))
    elif form == "tiff":
        image.write_bytes(tiff_of_16_bits(levels))
    else:
        image = levels
    read = np.asarray(read_image(image))
    error = np.abs(read - levels / 65535 * 255).max()
    assert read.shape == (20, 24, 3) and error <= (0.51 if form == "array" else 1)  # PIL cuts the low byte off


def test_floating_point_tiff(tmp_path):
    levels = np.random.default_rng(0).random((20, 24), dtype=np.float32)
    Image.fromarray(levels).save(tmp_path / "a.tiff")
    assert np.abs(np.asarray(read_image(tmp_path / "a.tiff")) - 255 * levels[..., None]).max() <= 0.51
    Image.fromarray(levels * 255).save(tmp_path / "b.tiff")
    with pytest.raises(ValueError, match=r"image .*b\.tiff holds floats that are not from 0 to 1: scale them, or"):
        read_image(tmp_path / "b.tiff")


@pytest.mark.parametrize("mode", ["I", "I;16", "I;16B"])
@pytest.mark.parametrize("most", [255, 65535])
def test_whole_numbers_of_16_and_32_bits(mode, most, tmp_path):
    """Only 32 bits can hold an 8-bit picture; a 16-bit one that is nearly black stays so."""
    levels = np.linspace(0, most, 400).round().astype(np.int32).reshape(20, 20)
    kind = {"I": np.int32, "I;16": "<u2", "I;16B": ">u2"}[mode]
    picture = Image.frombytes(mode, (20, 20), levels.astype(kind).tobytes())
    picture.save(tmp_path / "a.tiff")
    for image in (picture, tmp_path / "a.tiff"):
        scale = 1 if mode == "I" and most == 255 else 257
        assert np.abs(np.asarray(read_image(image)) - levels[..., None] / scale).max() <= 0.51


@pytest.mark.parametrize("wrong", [-1, 65536])
def test_whole_numbers_that_fit_no_brightness(wrong, tmp_path):
    levels = np.zeros((20, 20), np.int32)
    levels[3, 4] = wrong
    Image.fromarray(levels).save(tmp_path / "a.tiff")
    with pytest.raises(ValueError, match=r"a\.tiff holds whole numbers that are not from 0 to 65535: scale them"):
        read_image(tmp_path / "a.tiff")


@pytest.mark.parametrize("ending", ["jpg", "png", "tiff"])
def test_photos_of_more_pixels_than_pil_reads(ending, tmp_path, monkeypatch):
    """JPEG and PNG, as phones make them, up to twice PIL's limit, and without its warning of an attack."""
    path, pixels = tmp_path / f"a.{ending}", 40 * 50
    Image.new("RGB", (40, 50)).save(path)
    for limit in (pixels // 4, pixels // 4 - 1):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        if ending != "tiff" and pixels <= 4 * limit:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                assert read_image(path).size == (40, 50)
        else:
            most = 2 * limit if ending == "tiff" else 4 * limit
            message = (
                rf"a\.{ending} cannot be read: Image size \(2000 pixels\) exceeds limit of {most} pixels; reduce it"
            )
            with pytest.raises(ValueError, match=message):
                read_image(path)
        assert limit == Image.MAX_IMAGE_PIXELS
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert read_image(path).size == (40, 50)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes that have names")
@pytest.mark.parametrize("ending", ["png", "gif"])
def test_images_come_through_pipes(ending, tmp_path):
    """They can be read once only: `p2pz edit /dev/stdin`."""
    file = io.BytesIO()
    Image.new("RGB", (32, 32), (255, 0, 0)).save(file, ending)
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_bytes(file.getvalue()), daemon=True)
    writer.start()
    assert read_image(tmp_path / "pipe").getpixel((0, 0)) == (255, 0, 0)
    writer.join()


@pytest.mark.parametrize("ending", ["jpg", "tiff"])
def test_cmyk(ending, pixels, tmp_path):
    smooth = np.asarray(Image.fromarray(pixels).resize((80, 60), Image.Resampling.BICUBIC))
    Image.fromarray(smooth).convert("CMYK").save(tmp_path / f"a.{ending}", quality=100)
    read = np.asarray(read_image(tmp_path / f"a.{ending}")).astype(int)
    assert np.abs(read - smooth).mean() <= (3 if ending == "jpg" else 1)


def exchanged_profile():
    """A colour profile in which red is sRGB's blue."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return profile.replace(b"rXYZ", b"none", 1).replace(b"bXYZ", b"rXYZ", 1).replace(b"none", b"bXYZ", 1)


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "tif"])
def test_colours_are_read_by_the_profile_of_a_picture(ending, tmp_path):
    picture, path = Image.new("RGB", (32, 32), (200, 10, 20)), tmp_path / f"a.{ending}"
    picture.save(path, icc_profile=exchanged_profile(), quality=100)
    seen = read_image(path)
    assert np.abs(np.subtract(seen.getpixel((9, 9)), (20, 10, 200))).max() <= 4 and "icc_profile" not in seen.info
    picture.save(path, icc_profile=b"no profile", quality=100)
    assert np.abs(np.subtract(read_image(path).getpixel((9, 9)), (200, 10, 20))).max() <= 4


def test_profiles_keep_transparency_and_the_callers_picture():
    picture = Image.new("RGBA", (32, 32), (255, 0, 0, 0))
    picture.info["icc_profile"] = exchanged_profile()
    picture.paste((255, 0, 0, 255), (0, 0, 32, 16))
    seen = read_image(picture)
    assert seen.getpixel((4, 4)) == (0, 0, 255) and seen.getpixel((4, 20)) == (255, 255, 255)
    assert picture.info["icc_profile"] == exchanged_profile() and picture.getpixel((4, 4)) == (255, 0, 0, 255)


def test_profiles_of_palettes_and_of_a_transparent_colour(tmp_path):
    for mode, options in (("P", {}), ("RGB", {"transparency": (0, 255, 0)})):
        picture = Image.new("RGB", (32, 32), (255, 0, 0))
        picture.paste((0, 255, 0), (0, 16, 32, 32))
        picture.convert(mode).save(tmp_path / "a.png", icc_profile=exchanged_profile(), **options)
        seen = read_image(tmp_path / "a.png")
        assert seen.getpixel((4, 4)) == (0, 0, 255)
        assert seen.getpixel((4, 20)) == ((255, 255, 255) if options else (0, 255, 0))


def test_bilevel_and_palette(tmp_path, pixels):
    black = pixels[..., 0] > 128
    Image.fromarray(black).save(tmp_path / "a.png")
    assert np.array_equal(read_image(tmp_path / "a.png"), 255 * black[..., None].repeat(3, axis=2).astype(np.uint8))
    few = Image.fromarray(pixels // 128 * 255).convert("P", palette=Image.Palette.ADAPTIVE)
    few.save(tmp_path / "b.gif")
    assert np.array_equal(read_image(tmp_path / "b.gif"), few.convert("RGB"))


def test_transparency_becomes_white(pixels):
    alpha = np.zeros((20, 24), np.uint8)
    alpha[:10] = 255
    alpha[15:] = 128
    read = np.asarray(read_image(np.dstack([pixels, alpha])))
    assert np.array_equal(read[:10], pixels[:10])
    assert (read[10:15] == 255).all()
    halfway = (pixels[15:].astype(int) * 128 + 255 * 127) / 255
    assert np.abs(read[15:] - halfway).max() <= 1


def test_palette_with_a_transparent_colour(tmp_path):
    indices = np.arange(400, dtype=np.uint8).reshape(20, 20) % 3
    picture = Image.fromarray(indices, "P")
    picture.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    picture.save(tmp_path / "a.png", transparency=1)
    colours = np.array([[255, 0, 0], [255, 255, 255], [0, 0, 255]], np.uint8)
    assert np.array_equal(read_image(tmp_path / "a.png"), colours[indices])


ORIENTATIONS = {  # of EXIF: what makes the pixels upright
    1: lambda x: x, 2: lambda x: x[:, ::-1], 3: lambda x: x[::-1, ::-1], 4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1), 6: lambda x: np.rot90(x, 3), 7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: np.rot90(x, 1), 9: lambda x: x,
}  # fmt: skip


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("ending", ["png", "jpg", "tiff", "webp"])
def test_exif_rotation_is_applied_once(orientation, ending, tmp_path):
    pixels = np.zeros((32, 48, 3), np.uint8)
    pixels[:16, :24], pixels[16:, 24:] = 250, 120
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / f"a.{ending}", exif=exif, quality=100)
    upright = read_image(tmp_path / f"a.{ending}")
    for picture in (upright, read_image(upright)):
        expected = ORIENTATIONS[orientation](pixels).astype(int)
        assert np.asarray(picture).shape == expected.shape and np.abs(np.asarray(picture) - expected).mean() < 3


def exif_of(*tags):
    """A JPEG's EXIF with tags of numbers, types and values as other programs write them."""
    rows = [struct.pack("<HHII", tag, kind, count, value) for tag, kind, count, value in tags]
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(rows)) + b"".join(rows) + bytes(4)


@pytest.mark.parametrize(("exif", "turned"), [
    (exif_of((0x0112, 3, 1, 6), (0x0132, 77, 1, 5)), True),  # a tag of a type that there is not
    (exif_of((0x0112, 3, 1, 6), (0x011A, 3, 1, 5)), True),  # a resolution that is no fraction
    (exif_of((0x0112, 2, 2, 0x36)), False),  # the orientation as a text
    (exif_of((0x0112, 3, 1, 6))[:20], False),
    (b"Exif\0\0no TIFF", False),
], ids=["unknown type", "wrong type", "text", "cut", "junk"])  # fmt: skip
@pytest.mark.parametrize("ending", ["jpg", "png"])
def test_damaged_exif_keeps_no_picture_from_being_read(exif, turned, ending, tmp_path):
    path = tmp_path / f"a.{ending}"
    Image.new("RGB", (48, 32)).save(path, exif=exif)
    assert read_image(path).size == ((32, 48) if turned else (48, 32))


def broken_files(path):
    whole = path / "whole.png"
    Image.new("RGB", (200, 200), "red").save(whole)
    (path / "truncated.png").write_bytes(whole.read_bytes()[:-100])
    (path / "text.png").write_text("not an image")
    (path / "empty.png").touch()
    (path / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100))
    (path / "camera.cr2").write_bytes(b"II*\0\x10\0\0\0CR\x02\0" + bytes(100))
    Image.new("RGB", (15, 15)).save(path / "small.png")


ERRORS = [
    ("missing.png", "missing.png does not exist"),
    ("truncated.png", "truncated.png cannot be read"),
    (
        "text.png",
        "text.png cannot be read: it is damaged or of an unknown format; save it as JPEG or PNG with another program$",
    ),
    ("empty.png", "empty.png cannot be read: it is damaged or"),
    ("phone.heic", "phone.heic cannot be read: .*; save it as JPEG or PNG with"),
    ("camera.cr2", "camera.cr2 cannot be read: .*; save it as JPEG or PNG with"),
    ("small.png", "small.png has 15 x 15 pixels and cannot be edited"),
    (".", "cannot be read: is a directory$"),
    (np.zeros((1, 1, 3), np.uint8), "1 x 1 pixels"),
    (np.zeros((15, 64, 3), np.uint8), "64 x 15 pixels"),
    (np.zeros((16, 129, 3), np.uint8), "129 x 16 pixels"),
    (np.zeros((0, 20, 3), np.uint8), r"not \[0, 20, 3\]"),
    (np.zeros((3, 20, 20), np.uint8), r"not \[3, 20, 20\]"),
    (np.zeros((1, 20, 20, 3), np.uint8), "image array has shape"),
    (np.zeros((20, 20, 3), np.int64), "not int64"),
    (np.full((20, 20, 3), 1.01), "from 0 to 1"),
    (np.full((20, 20, 3), -0.01), "from 0 to 1"),
    (np.full((20, 20, 3), np.nan), "from 0 to 1"),
    (None, "not NoneType"),
    (torch.zeros(3, 20, 20), "not Tensor"),
]


@pytest.mark.parametrize(
    ("image", "message"), ERRORS, ids=lambda value: str(value)[:16] if isinstance(value, str) else ""
)
def test_unusable_images_are_refused(image, message, tmp_path):
    broken_files(tmp_path)
    with pytest.raises(ValueError, match=message):
        read_image(tmp_path / image if isinstance(image, str) else image)


def test_an_empty_path():
    with pytest.raises(ValueError, match=r"^the path of the image is empty$"):
        read_image("")


def test_smallest_and_longest_image_that_are_read():
    assert read_image(np.zeros((16, 16, 3), np.uint8)).size == (16, 16)
    assert read_image(np.zeros((16, 128, 3), np.uint8)).size == (128, 16)


@pytest.mark.parametrize(("native", "multiple"), [(128, 4), (512, 8), (768, 8)])
def test_working_size(native, multiple):
    assert working_size((native, native), native, multiple) == (native, native)
    assert working_size((3 * native, 3 * native), native, multiple) == (native, native)
    for size in np.random.default_rng(0).integers(16, 4000, (300, 2)).tolist():
        if max(size) > 8 * min(size):
            continue
        width, height = worked = working_size(tuple(size), native, multiple)
        assert width % multiple == height % multiple == 0
        assert working_size(size[::-1], native, multiple) == worked[::-1]
        assert working_size(worked, native, multiple) == worked
        if worked != tuple(size):  # rounding moves a side by at most half a multiple
            scale = native / (size[0] * size[1]) ** 0.5
            assert abs(width - size[0] * scale) <= multiple / 2 and abs(height - size[1] * scale) <= multiple / 2
        assert min(worked) >= multiple


@pytest.mark.parametrize("size", [(64, 64), (65, 97), (333, 511), (512, 512), (1023, 769), (1536, 1024), (1536, 1536)])
@pytest.mark.parametrize("native", [64, 128, 512, 768, 1536])
def test_sizes_from_64_to_1536(size, native):
    """Aspect ratio and number of pixels, as near as multiples of 8 allow, and back to the image's own size."""
    picture = read_image(np.zeros((size[1], size[0], 3), np.uint8))
    width, height = working_size(picture.size, native, 8)
    assert width % 8 == height % 8 == 0 and abs(width * height / native**2 - 1) <= 8 / min(width, height) + 0.01
    assert abs(width / height / (size[0] / size[1]) - 1) <= 8 / min(width, height)
    assert to_original_size(Image.new("RGB", (width, height)), picture).size == size


def test_to_original_size_is_upright_and_leaves_equal_sizes_alone(pixels, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)  # 24 x 20, lying on its side
    result = Image.fromarray(pixels).resize((16, 24))
    assert to_original_size(result, tmp_path / "a.png").size == (20, 24)
    assert to_original_size(result, np.zeros((24, 16, 3), np.uint8)) is result
    grey = Image.new("RGB", (32, 32), (90, 90, 90))
    assert np.all(np.asarray(to_original_size(grey, np.zeros((77, 50, 3), np.uint8))) == 90)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((4000, 3000), (592, 440)),
        ((300, 400), (440, 592)),
        ((4096, 512), (1448, 184)),
        ((528, 520), (528, 520)),  # 4.7 % more than 512 x 512
        ((528, 521), (512, 512)),
        ((528, 528), (512, 512)),  # 6.35 %, more than a sixteenth
    ],
)
def test_working_size_by_hand(size, expected):
    """512 sqrt(4/3) = 591.2, 512 sqrt(3/4) = 443.4; 512 sqrt(8) = 1448.2, 512 / sqrt(8) = 181.0, to multiples of 8."""
    assert working_size(size, 512, 8) == expected


def test_all_values_survive_the_round_trip():
    values = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2).copy()
    values[..., 1] = 255 - values[..., 1]
    pictures = [Image.fromarray(values), Image.fromarray(values[::-1].copy())]
    tensor = to_tensor(pictures)
    assert tensor.shape == (2, 3, 16, 16) and tensor.dtype == torch.float32
    assert tensor.min() == -1 and tensor.max() == 1
    assert tensor[0, 0, 0, 1] == pytest.approx(1 / 127.5 - 1) and tensor[0, 1, 0, 0] == 1
    assert all(np.array_equal(*pair) for pair in zip(to_pictures(tensor), pictures, strict=True))


def test_to_pictures_clamps_and_rounds():
    values = torch.tensor([-7.0, -1, -0.999, 0, 0.999, 1, 7]).expand(1, 3, 1, 7)
    assert np.asarray(to_pictures(values)[0])[0, :, 0].tolist() == [0, 0, 0, 128, 255, 255, 255]
    assert np.asarray(to_pictures(values.half())[0])[0, :, 0].tolist() == [0, 0, 0, 128, 255, 255, 255]


def test_psnr_by_hand():
    black, picture = np.zeros((4, 5, 3), np.uint8), np.zeros((4, 5, 3), np.uint8)
    assert psnr(picture, black) == float("inf")
    picture[0, 0] = 255, 0, 0  # a squared error of 255^2 in one of 60 values
    assert psnr(picture, black) == psnr(black, picture) == pytest.approx(10 * np.log10(60))
    assert psnr(Image.fromarray(picture), Image.fromarray(black)) == pytest.approx(10 * np.log10(60))
    mask = np.zeros((4, 5), bool)
    mask[0, :2] = True
    assert psnr(picture, black, mask) == pytest.approx(10 * np.log10(6))
    assert psnr(picture, black, ~mask) == float("inf")
    assert psnr(np.full((2, 2, 3), 10, np.uint8), np.full((2, 2, 3), 13, np.uint8)) == pytest.approx(38.5884, abs=1e-4)


def test_same_size_groups_keep_the_order():
    sizes = [(8, 8), (8, 4), [8, 8], (4, 8), (8, 4)]
    assert same_size_groups(sizes) == [[0, 2], [1, 4], [3]]
    assert same_size_groups([]) == []


def test_as_list():
    array = np.zeros((20, 20, 3))
    assert as_list("a.png") == (["a.png"], True)
    assert as_list(("a", "b")) == (["a", "b"], False) and as_list(["a"]) == (["a"], False)
    items, single = as_list(array)
    assert items[0] is array and single
    with pytest.raises(ValueError, match="empty"):
        as_list([])


def test_saved_image_is_read_back(pixels, tmp_path):
    for path in (tmp_path / "a.png", str(tmp_path / "B.PNG")):
        save_image(Image.fromarray(pixels), path)
        assert np.array_equal(read_image(path), pixels)
    save_image(Image.fromarray(pixels), tmp_path / "a.jpg")
    assert Image.open(tmp_path / "a.jpg").format == "JPEG"


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_saved_files_have_ordinary_permissions(umask, pixels, tmp_path):
    before = os.umask(umask)
    try:
        save_image(Image.fromarray(pixels), tmp_path / "a.png")
    finally:
        assert os.umask(before) == umask
    assert stat.S_IMODE((tmp_path / "a.png").stat().st_mode) == 0o666 & ~umask


@pytest.mark.parametrize(
    ("error", "told", "message"),
    [
        (OSError(28, "No space left on device"), ValueError, r"^cannot write .*a\.png: no space left on device$"),
        (OSError("encoder error -2"), ValueError, r"^cannot write .*a\.png: encoder error -2$"),
        (KeyboardInterrupt("enough"), KeyboardInterrupt, "enough"),
    ],
)
@pytest.mark.parametrize("old", [b"old", None])
def test_failing_save_leaves_everything_as_it_was(error, told, message, old, pixels, tmp_path, monkeypatch):
    def fail(self, path, *args, **kwargs):
        if isinstance(path, io.BytesIO):  # a trial whether the format can be written
            return
        path.write_bytes(b"half of it")
        raise error

    path = tmp_path / "a.png"
    if old:
        path.write_bytes(old)
    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(told, match=message):
        save_image(Image.fromarray(pixels), path)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == ([old] if old else [])


def test_atomic_path_shows_nothing_before_the_end(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_text("old")
    with atomic_path(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
        assert temporary.parent == tmp_path and temporary.suffix == ".safetensors"
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["a.safetensors"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.txt", "ends in .png"),
        ("a", "ends in .png"),
        ("a.safetensors", "ends in .png"),
        ("no/a.png", "does not exist"),
        ("folder.png", "is a folder"),
    ],
)
def test_paths_that_cannot_be_written(name, message, pixels, tmp_path):
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(ValueError, match=message):
        check_image_path(tmp_path / name)
    with pytest.raises(ValueError, match=message):
        save_image(Image.fromarray(pixels), tmp_path / name)
    assert os.listdir(tmp_path) == ["folder.png"]
