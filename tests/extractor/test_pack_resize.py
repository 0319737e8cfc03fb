"""`pack --resize`: what is made smaller, what is copied, and the loss."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from samples import encoded, mask_png, picture

from classlens.extractor.pack import pack_imagefolder
from classlens.extractor.pack_resize import Resizer
from classlens.extractor.plan import Unit
from classlens.extractor.shards import read_samples


def sample(image: bytes, mask: bytes | None = None, extension: str = "jpg") -> dict:
    members = {"__key__": "a", extension: image, "cls": b"3", "json": b'{"mask_id": 303}'}
    return members if mask is None else members | {"mask.png": mask}


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_a_picture_and_its_mask_shrink_alike(form):
    before = sample(encoded(picture(1, (400, 250)), form), mask_png(1, 303, (400, 250)), "png")
    after = Resizer(100, images=1)(before)
    assert list(after) == ["__key__", "cls", "json", "mask.png", "jpg"]
    assert (after["__key__"], after["cls"]) == ("a", b"3")
    assert json.loads(after["json"]) == {"mask_id": 303, "resized": 100}
    image, mask = opened(after["jpg"]), opened(after["mask.png"])
    assert (image.format, image.size, mask.size) == ("JPEG", (160, 100), (160, 100))
    ids = np.asarray(mask, np.int32)
    assert set(np.unique(ids[..., 0] + 256 * ids[..., 1])) == {0, 303, 1000}  # none is blended
    expected = np.asarray(opened(before["png"]).convert("RGB").resize((160, 100), 3), np.int16)
    assert np.abs(np.asarray(image, np.int16) - expected).mean() < 2


@pytest.mark.parametrize(
    "whole",
    [
        sample(encoded(picture(1, (400, 100)))),  # short side as wanted
        sample(b"no picture"),
        sample(encoded(picture(1, (400, 250)))[:500]),
        sample(encoded(picture(1, (400, 250))), b"no mask"),
        sample(encoded(picture(1, (400, 250))), mask_png(1, 303, (200, 125))),
    ],
)
def test_all_else_is_copied(whole):
    resizer = Resizer(100, images=1)
    assert resizer(dict(whole)) == whole
    assert (resizer.loss().resized, resizer.loss().images_compared) == (0, 0)


def test_the_loss_grows_with_the_reduction():
    images = [encoded(picture(i, (500, 375)), "PNG") for i in range(3)]
    losses = []
    for short_side in (374, 256, 64):
        resizer = Resizer(short_side, images=3)
        for image in images:
            resizer(sample(image, extension="png"))
        losses.append(resizer.loss())
    assert [loss.images_compared for loss in losses] == [3, 3, 3]
    assert losses[0].mean_abs_difference < losses[1].mean_abs_difference
    assert losses[1].mean_abs_difference < losses[2].mean_abs_difference
    assert all(loss.mean_abs_difference <= loss.max_abs_difference for loss in losses)


def test_a_sample_of_many_images_is_compared():
    resizer = Resizer(30, images=100)
    for i in range(100):
        resizer(sample(encoded(picture(i, (48, 40)))))
    assert resizer.loss().resized == 100
    assert 32 <= resizer.loss().images_compared <= 34


def test_an_image_folder_is_packed_smaller(tmp_path: Path):
    for i, size in enumerate([(90, 60), (60, 90), (30, 20)]):
        path = tmp_path / "photos" / "dog" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(picture(i, size), "PNG"))
    out = tmp_path / "shards"
    summary = pack_imagefolder(tmp_path / "photos", out, resize=40)
    assert summary.resize is not None
    assert (summary.resize.short_side, summary.resize.resized) == (40, 2)
    shard = out / "shard-000000.tar"
    found = list(read_samples(Unit(0, shard, 0, shard.stat().st_size, 3, masks=False)))
    assert [opened(s.get("jpg") or s["png"]).size for s in found] == [(60, 40), (40, 60), (30, 20)]
    assert ["resized" in json.loads(s["json"]) for s in found] == [True, True, False]
    pack_imagefolder(tmp_path / "photos", tmp_path / "again", resize=40)
    assert (tmp_path / "again" / shard.name).read_bytes() == shard.read_bytes()
    assert pack_imagefolder(tmp_path / "photos", tmp_path / "whole").resize is None
