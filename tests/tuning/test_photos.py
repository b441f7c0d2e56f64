"""Photos of one subject: every format upright, square and on grey; what cannot be read is named, and never decoded."""

import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from mvdream_fast.core.errors import InputFileError
from mvdream_fast.core.rng import Stream
from mvdream_fast.data.backgrounds import on_background
from mvdream_fast.tuning import photos as module
from mvdream_fast.tuning.photos import MAX_PHOTOS, PhotoSource, draw, list_photos, load_photo

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def stripes(*colors, side=20) -> np.ndarray:
    """Squares of colours side by side, [side, n * side, 3]."""
    return np.concatenate([np.full((side, side, 3), color, np.uint8) for color in colors], axis=1)


def near(pixel, color, by=12) -> bool:
    return bool((np.abs(pixel.astype(int) - color) <= by).all())


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.JPEG", "a.webp"])
@pytest.mark.parametrize("tall", [False, True])
def test_a_photo_is_cropped_to_its_middle(tmp_path, name, tall):
    pixels = stripes(RED, GREEN, BLUE)
    Image.fromarray(pixels.transpose(1, 0, 2) if tall else pixels).save(tmp_path / name, quality=95)
    photo = load_photo(tmp_path / name, 8)
    assert photo.shape == (8, 8, 4)
    assert photo.dtype == np.uint8
    assert near(photo[2:6, 2:6, :3], GREEN, 30)
    assert (photo[..., 3] == 255).all()


@pytest.mark.parametrize("name", ["a.png", "a.webp"])
def test_a_cut_out_is_padded_and_lies_on_grey(tmp_path, name):
    rgba = np.zeros((10, 30, 4), np.uint8)
    rgba[..., :3] = GREEN  # under transparent pixels too: it must not bleed
    rgba[:, 10:20] = (*RED, 255)
    Image.fromarray(rgba).save(tmp_path / name, lossless=True)
    photo = load_photo(tmp_path / name, 30)
    assert (photo[:9, :, 3] == 0).all()
    assert (photo[21:, :, 3] == 0).all()
    assert (photo[15, 12:18] == (*RED, 255)).all()
    on_grey = on_background(photo[None], torch.full((3,), 0.5))[0]
    assert on_grey.shape == (3, 30, 30)
    assert on_grey[:, 2, 2].abs().max() < 1e-6  # 0.5 in [0, 1] is 0 in [-1, 1]
    assert torch.equal(on_grey[:, 15, 15], torch.tensor([1.0, -1.0, -1.0]))
    assert on_grey[1].max() < 1e-6  # no green anywhere


def test_fit_can_be_chosen(tmp_path):
    Image.fromarray(stripes(RED, GREEN, BLUE)).save(tmp_path / "a.png")
    padded = load_photo(tmp_path / "a.png", 30, "pad")
    assert padded[0, 0, 3] == 0
    assert near(padded[15, 2, :3], RED)
    assert near(padded[15, 28, :3], BLUE)
    rgba = np.full((10, 30, 4), 255, np.uint8)
    rgba[0, 0, 3] = 0
    Image.fromarray(rgba).save(tmp_path / "b.png")
    assert (load_photo(tmp_path / "b.png", 10, "crop")[..., 3] == 255).all()


@pytest.mark.parametrize(
    ("alphas", "left"),
    [
        ([], RED),  # solid all over: the square in the middle, all of it
        ([254], RED),
        ([0] * 3, RED),  # 3 of 400 pixels
        ([128] * 400, RED),  # soft all over, as a sheet of glass
        ([0] * 4, None),  # one in a hundred: a cut-out, which is padded
        ([127] * 4, None),
    ],
)
def test_what_makes_a_cut_out(tmp_path, alphas, left):
    rgba = np.full((10, 40, 4), 255, np.uint8)
    rgba[..., :3] = RED
    rgba.reshape(-1, 4)[: len(alphas), 3] = alphas
    Image.fromarray(rgba).save(tmp_path / "a.png")
    photo = load_photo(tmp_path / "a.png", 40)
    if left is None:
        assert (photo[:14, :, 3] == 0).all()
    else:
        assert near(photo[2, 2, :3], left)
        assert photo[2, 2, 3] >= 128


@pytest.mark.parametrize("fit", ["auto", "crop", "pad"])
@pytest.mark.parametrize("alpha", [0, 25])
def test_a_photo_that_shows_nothing_is_refused(tmp_path, fit, alpha):
    rgba = np.full((8, 8, 4), alpha, np.uint8)
    Image.fromarray(rgba).save(tmp_path / "a.png")
    with pytest.raises(InputFileError, match=r"a\.png shows nothing: its square is transparent all over; leave it out"):
        load_photo(tmp_path / "a.png", 8, fit)


def test_a_subject_beside_the_square_is_refused_too(tmp_path):
    rgba = np.zeros((10, 30, 4), np.uint8)
    rgba[:, :5] = 255
    Image.fromarray(rgba).save(tmp_path / "a.png")
    assert load_photo(tmp_path / "a.png", 30)[15, 2, 3] == 255
    with pytest.raises(InputFileError, match="shows nothing"):
        load_photo(tmp_path / "a.png", 30, "crop")


def save_heic(path, pixels) -> None:
    import pillow_heif

    pillow_heif.from_pillow(Image.fromarray(pixels)).save(path, quality=95)


@pytest.mark.parametrize("name", ["a.heic", "IMG_0001.HEIC", "a.heif", "a.jpg"])
def test_a_phone_s_heic_under_any_name(tmp_path, name):
    save_heic(tmp_path / name, stripes(RED, GREEN, BLUE, side=64))
    assert list_photos(tmp_path) == [tmp_path / name]
    photo = load_photo(tmp_path / name, 8)
    assert photo.shape == (8, 8, 4)
    assert near(photo[4, 4, :3], GREEN, 40)
    assert near(load_photo(tmp_path / name, 9, "pad")[4, 1, :3], RED, 40)


def test_heic_without_its_reader_is_told(tmp_path, monkeypatch):
    save_heic(tmp_path / "a.heic", stripes(RED, side=64))
    monkeypatch.setattr(module, "_has_heif", lambda: False)
    with pytest.raises(InputFileError, match=r"among 1 entries: 1 HEIC, which needs pillow-heif; pip install 'mvdream"):
        list_photos(tmp_path)
    Image.fromarray(stripes(RED)).save(tmp_path / "b.png")
    said = []
    assert list_photos(tmp_path, said.append) == [tmp_path / "b.png"]
    assert said == [
        f"1 of the 2 entries of {tmp_path} are passed over: 1 HEIC, which needs pillow-heif; "
        "pip install 'mvdream_fast[heic]', or save as JPEG (a.heic)"
    ]
    (tmp_path / "a.heic").rename(tmp_path / "c.jpg")
    with pytest.raises(InputFileError, match=r"c\.jpg is HEIC, which needs pillow-heif; pip install"):
        load_photo(tmp_path / "c.jpg", 8)


def test_a_broken_heic_is_named(tmp_path):
    save_heic(tmp_path / "a.heic", stripes(RED, side=64))
    (tmp_path / "a.heic").write_bytes((tmp_path / "a.heic").read_bytes()[:200])
    with pytest.raises(InputFileError, match=r"a\.heic cannot be read as PNG, JPEG, WebP or HEIC"):
        load_photo(tmp_path / "a.heic", 8)


def test_what_is_passed_over_is_told_by_reason(tmp_path):
    for name in ("b.PNG", "a.jpg", "d.jfif", "._a.jpg", ".DS_Store", "notes.txt", "1.gif", "2.tiff", "3.mov"):
        (tmp_path / name).touch()
    (tmp_path / "more").mkdir()
    said = []
    assert [path.name for path in list_photos(tmp_path, said.append)] == ["a.jpg", "b.PNG", "d.jfif"]
    assert said == [
        f"7 of the 10 entries of {tmp_path} are passed over: 2 hidden (.DS_Store, ._a.jpg); "
        "4 no PNG, JPEG, WebP or HEIC (1.gif, 2.tiff, 3.mov, ...); 1 a folder, not looked into (more)"
    ]
    for name in ("b.PNG", "a.jpg", "d.jfif"):
        (tmp_path / name).unlink()
    with pytest.raises(InputFileError, match=r"got none among 7 entries: 2 hidden"):
        list_photos(tmp_path)
    said.clear()
    Image.fromarray(stripes(RED)).save(tmp_path / "more" / "a.png")
    list_photos(tmp_path / "more", said.append)
    assert said == []


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp"])
def test_exif_orientation_is_applied(tmp_path, name):
    """Orientation 6: the camera was turned, and the stored left edge is the top of the image."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(stripes(RED, BLUE)).save(tmp_path / name, exif=exif, quality=95)
    photo = load_photo(tmp_path / name, 8, "pad")
    assert near(photo[1, 4, :3], RED, 40)
    assert near(photo[6, 4, :3], BLUE, 40)


def test_other_modes(tmp_path):
    deep = np.linspace(0, 65535, 16 * 16).reshape(16, 16).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert abs(int(load_photo(tmp_path / "deep.png", 16)[15, 15, 0]) - 255) <= 2
    assert abs(int(load_photo(tmp_path / "deep.png", 16)[8, 0, 0]) - int(deep[8, 0]) // 257) <= 2
    Image.fromarray(stripes(RED)).convert("L").save(tmp_path / "grey.jpg")
    assert np.ptp(load_photo(tmp_path / "grey.jpg", 8)[..., :3], axis=-1).max() == 0
    Image.fromarray(stripes(RED)).convert("CMYK").save(tmp_path / "print.jpg", quality=95)
    assert near(load_photo(tmp_path / "print.jpg", 8)[4, 4, :3], RED, 40)
    Image.fromarray(stripes(RED)).convert("P").save(tmp_path / "table.png")
    assert near(load_photo(tmp_path / "table.png", 8)[4, 4, :3], RED)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_grey_that_stands_for_nothing_is_transparent(tmp_path, dtype):
    level = np.zeros((32, 32), dtype)
    level[:16] = np.iinfo(dtype).max // 4 * 3
    Image.fromarray(level).save(tmp_path / "cut.png", transparency=0)
    photo = load_photo(tmp_path / "cut.png", 32)
    assert (photo[:15, :, 3] == 255).all()
    assert (photo[17:, :, 3] == 0).all()
    assert near(photo[4, 4, :3], (191, 191, 191), 2)


def test_a_long_strip_is_cropped_before_it_is_enlarged(tmp_path, monkeypatch):
    sizes, resize = [], Image.Image.resize

    def noted(self, size, *args, **kwargs):
        sizes.append(size)
        return resize(self, size, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "resize", noted)
    strip = np.zeros((4, 3001, 3), np.uint8)
    strip[:, 1490:1510] = (200, 100, 50)
    Image.fromarray(strip).save(tmp_path / "strip.png")
    photo = load_photo(tmp_path / "strip.png", 64)
    assert {*sizes} == {(64, 64)}
    assert (photo == [200, 100, 50, 255]).all()


def png_of(width: int, height: int) -> bytes:
    """A PNG that promises any size and holds hardly anything."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(9000, 9000), (12000, 12000), (60000, 60000)])
def test_a_decompression_bomb_is_not_decoded(tmp_path, size, monkeypatch):
    (tmp_path / "a.png").write_bytes(png_of(*size))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("it was decoded"))
    with pytest.raises(InputFileError, match=r"a\.png must have at most 64 million pixels"):
        load_photo(tmp_path / "a.png", 8)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp"])
@pytest.mark.parametrize("cut", [0, 12, 40])
def test_a_broken_photo_is_named(tmp_path, name, cut):
    Image.fromarray(stripes(RED, GREEN)).save(tmp_path / name)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:cut])
    with pytest.raises(InputFileError, match=f"{name} cannot be read as PNG, JPEG, WebP or HEIC"):
        load_photo(tmp_path / name, 8)


def test_another_format_under_a_photos_name(tmp_path):
    Image.fromarray(stripes(RED)).save(tmp_path / "a.gif")
    (tmp_path / "a.gif").rename(tmp_path / "a.png")
    with pytest.raises(InputFileError, match="cannot be read as PNG"):
        load_photo(tmp_path / "a.png", 8)


def test_what_a_folder_holds(tmp_path):
    with pytest.raises(InputFileError, match="must hold PNG, JPEG, WebP or HEIC photos, got none among 0 entries$"):
        list_photos(tmp_path)
    for name in ("b.PNG", "a.jpg", ".hidden.png", "notes.txt"):
        (tmp_path / name).touch()
    assert [path.name for path in list_photos(tmp_path)] == ["a.jpg", "b.PNG"]
    with pytest.raises(InputFileError, match="must be a folder of photos, got a file"):
        list_photos(tmp_path / "a.jpg")
    with pytest.raises(InputFileError, match="cannot read the folder of photos"):
        list_photos(tmp_path / "nowhere")
    (tmp_path / "c.png").mkdir()
    with pytest.raises(InputFileError, match=r"c\.png must be a photo, got a folder"):
        list_photos(tmp_path)


def test_too_many_and_too_large(tmp_path, monkeypatch):
    for i in range(MAX_PHOTOS + 1):
        (tmp_path / f"{i:02d}.png").touch()
    with pytest.raises(InputFileError, match=f"must hold 1 to {MAX_PHOTOS} photos, got {MAX_PHOTOS + 1}"):
        list_photos(tmp_path)
    (tmp_path / "00.png").unlink()
    assert len(list_photos(tmp_path)) == MAX_PHOTOS
    with open(tmp_path / "01.png", "wb") as file:
        file.truncate((64 << 20) + 1)  # a hole: it takes no disk
    with pytest.raises(InputFileError, match="must be at most 64 MB, got 64 MB"):
        list_photos(tmp_path)


def test_batches_show_every_photo_equally():
    assert sorted(draw(4, 8, Stream(0, 0, "x"))) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert len(set(draw(4, 3, Stream(0, 0, "x")))) == 3
    pictures = torch.arange(3.0)[:, None, None, None].expand(3, 3, 2, 2)
    batch = PhotoSource(pictures, "a sks chair").batch(Stream(0, 5, "x"), 4, 1, False)
    assert batch.cameras is None
    assert batch.n_views == 1
    assert batch.captions == ["a sks chair"] * 4
    assert set(batch.images[:, 0, 0, 0].tolist()) == {0.0, 1.0, 2.0}
    with pytest.raises(ValueError, match="multi_view must be False"):
        PhotoSource(pictures, "x").batch(Stream(0, 0, "x"), 1, 4, True)
