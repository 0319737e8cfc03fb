"""simplejpeg gives PIL's pixels, and PIL has the last word on every file it would not take."""

import io

import numpy as np
import pytest
from PIL import Image
from samples import encoded, picture
from variants import config

from classlens.extractor.jpeg import decoder_facts, to_rgb
from classlens.extractor.prepare import prepare
from classlens.extractor.run import extract
from classlens.extractor.schema import Status, read_attributes
from classlens.extractor.shards import Decoder, Planned, decode

SAVED = {
    "baseline": {},
    "progressive": {"progressive": True},
    "full chroma": {"subsampling": 0},
    "half chroma": {"subsampling": 1},
    "coarse": {"quality": 20},
    "restart markers": {"restart_marker_rows": 1},
    "RGB": {"keep_rgb": True},
}


def saved(mode: str = "RGB", size: tuple[int, int] = (61, 43), **options) -> bytes:
    buffer = io.BytesIO()
    picture(3, size).convert(mode).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def by(decoder: str, data: bytes) -> np.ndarray | None:
    """Pixels, or None where the decoder refuses the file."""
    try:
        return np.asarray(to_rgb(data, Image.open(io.BytesIO(data)), decoder))
    except Exception:
        return None


def assert_same(data: bytes) -> np.ndarray | None:
    pil, ours = by("pil", data), by("simplejpeg", data)
    assert (pil is None) == (ours is None)
    assert pil is None or np.array_equal(pil, ours)
    return ours


@pytest.mark.parametrize("size", [(1, 1), (17, 90), (61, 43), (200, 150)])
@pytest.mark.parametrize("kind", SAVED)
def test_every_kind_of_jpeg_has_pils_pixels(kind, size, monkeypatch):
    data = saved(size=size, **SAVED[kind])
    pil = by("pil", data)
    monkeypatch.setattr(Image.Image, "convert", None)  # PIL does not decode this one
    assert np.array_equal(by("simplejpeg", data), pil)


def test_what_simplejpeg_does_not_take_goes_through_pil():
    assert assert_same(saved("L")) is not None
    assert assert_same(saved("CMYK")) is not None
    for form in ("PNG", "WEBP"):
        assert assert_same(encoded(picture(1), form)) is not None


def test_the_exif_orientation_is_not_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90°
    assert assert_same(saved(exif=exif)).shape == (43, 61, 3)


@pytest.mark.parametrize("kind", ["baseline", "progressive", "restart markers"])
def test_a_file_cut_anywhere_gets_pils_verdict(kind):
    data = saved(**SAVED[kind])
    verdicts = [assert_same(data[:cut]) is None for cut in range(0, len(data), 7)]
    assert sum(verdicts) >= len(verdicts) - 1
    for cut in range(len(data) - 4, len(data)):  # within the end marker
        assert_same(data[:cut])


def test_a_flipped_bit_anywhere_gets_pils_verdict():
    data, refused = saved(), 0
    random = np.random.default_rng(0)
    for place in random.integers(0, len(data), 400):
        flipped = bytearray(data)
        flipped[place] ^= 1 << random.integers(8)
        refused += assert_same(bytes(flipped)) is None
    assert refused


def test_a_cut_image_is_a_row_that_says_so(make_shards):
    prepared = prepare(config("cls"), [str(s) for s in make_shards((1,), mask=False)])
    geometry, grid = prepared.subject.geometry, prepared.subject.grid
    row, pixels = {"label": 1, "mask_id": None}, np.zeros((32, 32, 3), np.uint8)
    data = saved()
    for name in ("simplejpeg", "pil"):
        decoder = Decoder(name, geometry, grid, classes=10, max_pixels=10**6, masks=False)
        for cut in range(0, len(data) - 2, 97):
            image = Planned(0, row, {"jpg": data[:cut]}, masked=False)
            assert decode(image, decoder, pixels).status is Status.UNDECODABLE
        image = Planned(0, row, {"jpg": data}, masked=False)
        assert decode(image, decoder, pixels).status is Status.OK


def test_the_difference_from_pil_is_measured(monkeypatch):
    files = [saved(), b"no picture", saved("L"), encoded(picture(0, (300, 300)))]
    facts = decoder_facts("simplejpeg", files, max_pixels=10_000)
    assert (facts["name"], facts["images_compared"]) == ("simplejpeg", 2)
    assert (facts["max_abs_difference"], facts["mean_abs_difference"]) == (0, 0.0)

    def off_by_one(data, *_, **__):
        return by("pil", data) ^ 1

    monkeypatch.setattr("simplejpeg.decode_jpeg", off_by_one)
    facts = decoder_facts("simplejpeg", files[:1], max_pixels=10_000)
    assert (facts["max_abs_difference"], facts["mean_abs_difference"]) == (1, 1.0)


def test_both_decoders_make_the_same_arrays(make_shards, tmp_path):
    shards = [str(s) for s in make_shards((5, 3))]
    for decoder in ("simplejpeg", "pil"):
        extract(prepare(config("cls", decoder=decoder), shards), tmp_path / decoder)
        facts = read_attributes(tmp_path / decoder)["decoder"]
        assert (facts["name"], facts["images_compared"]) == (decoder, 8)
        assert facts["max_abs_difference"] == 0
    chunks = [p.relative_to(tmp_path / "pil") for p in (tmp_path / "pil").rglob("c/**/*")]
    assert len(chunks) > 10
    for chunk in chunks:
        pair = [tmp_path / decoder / chunk for decoder in ("simplejpeg", "pil")]
        assert all(p.is_dir() for p in pair) or pair[0].read_bytes() == pair[1].read_bytes()
