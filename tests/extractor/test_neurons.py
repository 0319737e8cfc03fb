"""What is accumulated of every neuron against a brute force that keeps every activation."""

import io
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch
from PIL import Image
from variants import config

from classlens.analysis.neurons import class_means, exemplars
from classlens.extractor.blocks import walk
from classlens.extractor.engine import make_engine
from classlens.extractor.errors import ModelError, UsageError
from classlens.extractor.prepare import prepare
from classlens.extractor.run import extract
from classlens.extractor.store import verify

BATCH = 4


def settings(**changes):
    return config("registers", batch_size=BATCH, reduce=("neurons",), **changes)


def activations(
    configured, shards, keeps=lambda images: slice(None)
) -> tuple[np.ndarray, pl.DataFrame]:
    """key_mlp of all images at patches, float32 [N, L, G, F], in batches as the run's; manifest.

    ``keeps`` gives the rows that stay of a batch, by its normalised images.
    """
    prepared = prepare(configured, shards)
    subject, scorer = prepared.subject, make_engine(prepared).scorer
    found = []
    for unit in prepared.plan.units:
        rows = prepared.plan.manifest.filter(pl.col("unit") == unit.index)
        for part in rows.iter_slices(BATCH):
            pixels = []
            with unit.path.open("rb") as file:
                for row in part.iter_rows(named=True):
                    file.seek(row["offset"])
                    image = Image.open(io.BytesIO(file.read(row["size"]))).convert("RGB")
                    pixels.append(np.asarray(subject.geometry.crop(image)))
            with torch.inference_mode():
                batch = torch.from_numpy(np.stack(pixels))
                blocks = scorer.walk(batch[keeps(scorer.images(batch))])
                keys = [sites["key_mlp"][:, len(subject.prefix_kinds) :] for _, sites in blocks]
            found.append(torch.stack(keys, dim=1).float().numpy())
    return np.concatenate(found), prepared.plan.manifest


def slow_code(value: float) -> int:
    """The definition, with logarithms in place of bits."""
    shifted = np.float64(np.abs(np.float32(value)) + np.float32(0.125)) * 8
    octave = int(np.floor(np.log2(shifted)))
    m = min(127, 16 * octave + int(np.floor((shifted / 2.0**octave - 1) * 16)))
    return 127 - m if value < 0 else 128 + m


def same_picture_twice(samples) -> None:
    samples[7].members["jpg"] = samples[2].members["jpg"]


def slow_exemplars(peaks, images) -> list[tuple[float, int]]:
    return sorted(zip(peaks, images, strict=True), key=lambda pair: (-pair[0], pair[1]))[:15]


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "float32"},
        {"dtype": "bfloat16"},
        {"certify": True},
        {"compile": True},
        {"intervene": "self-only", "intervene_blocks": (1,)},
    ],
    ids=str,
)
def test_everything_equals_brute_force(make_shards, tmp_path, changes):
    shards = [str(s) for s in make_shards((13, 9), change=same_picture_twice)]
    out = tmp_path / "store"
    assert extract(prepare(settings(**changes), shards), out).status == {"ok": 22}
    x_NLGF, manifest = activations(settings(**changes), shards)
    N, L, G, F = x_NLGF.shape
    images, labels = manifest["image"].to_numpy(), manifest["label"].to_numpy()
    codes = np.vectorize(slow_code, otypes=[np.uint8])(x_NLGF)
    assert len(np.unique(codes)) > 30

    table = exemplars.exemplars(out)
    assert table.height == L * F * 15
    assert table["key"].to_list() == [
        dict(zip(images, manifest["key"], strict=True))[i] for i in table["image"]
    ]
    place_of = {image: n for n, image in enumerate(images)}
    for block in range(L):
        values, found, kept = exemplars.exemplar_codes(out, block)
        of_block = table.filter(pl.col("block") == block)
        assert (of_block["value"].to_numpy() == values.ravel()).all()
        assert (of_block["image"].to_numpy() == found.ravel()).all()
        counts = exemplars.histogram(out, block)
        for f in range(F):
            expected = slow_exemplars(x_NLGF[:, block, :, f].max(axis=1), images)
            assert list(zip(values[f], found[f], strict=True)) == expected
            for x, (_, image) in enumerate(expected):
                assert (kept[f, x] == codes[place_of[image], block, :, f]).all()
            assert (counts[f] == np.bincount(codes[:, block, :, f].ravel(), minlength=256)).all()

    for quantile in (0.01, 0.5, 0.99, 0.995):
        threshold_codes, values = exemplars.thresholds(out, quantile)
        rank = int(np.ceil(quantile * N * G - 1e-9))
        exact = np.sort(x_NLGF.transpose(1, 3, 0, 2).reshape(L, F, -1))[..., rank - 1]
        assert (threshold_codes == np.vectorize(slow_code)(exact)).all()
        assert (exact < values).all()
        assert (values - exact <= (np.abs(exact) + 0.125) / 16 * (1 + 1e-6)).all()
        above = x_NLGF.transpose(1, 3, 0, 2) >= values[:, :, None, None]
        assert (above == (codes.transpose(1, 3, 0, 2) > threshold_codes[:, :, None, None])).all()
        assert (above.sum(axis=(2, 3)) <= (1 - quantile) * N * G + 1e-9).all()

    means = class_means.class_means(out)
    assert means.classes.tolist() == sorted(set(labels.tolist()))
    # The order of summation may differ from torch's; each of G terms rounds once.
    exact = x_NLGF.astype(np.float64).mean(axis=2)
    error = 2.0**-17 + (G + 1) * 2.0**-24 * np.abs(x_NLGF).mean(axis=2).max()
    for k, label in enumerate(means.classes):
        assert means.counts[k] == (labels == label).sum()
        assert np.abs(means.means[k] - exact[labels == label].mean(axis=0)).max() <= error
    assert verify(out) == []


def spoilt(images: torch.Tensor) -> torch.Tensor:
    """Which normalised images the next test spoils, bool [N]."""
    return images[:, 0].mean(dim=(1, 2)) > 0


def test_an_image_that_overflows_late_leaves_no_trace(make_shards, tmp_path, monkeypatch):
    """Its activations of the first blocks are finite, and were counted with their batch."""

    def overflowing(model, images, *rest):
        for block, sites in walk(model, images, *rest):
            if block == 1:
                sites["attn"][spoilt(images), 2, 3] = float("inf")
            yield block, sites

    shards = [str(s) for s in make_shards((13, 9))]
    x_NLGF, _ = activations(settings(), shards, lambda images: ~spoilt(images))
    monkeypatch.setattr("classlens.extractor.scorer.walk", overflowing)
    out = tmp_path / "store"
    summary = extract(prepare(settings(), shards), out)
    assert summary.status == {"ok": len(x_NLGF), "nonfinite": 22 - len(x_NLGF)}
    assert 5 < len(x_NLGF) < 17
    codes = np.vectorize(slow_code, otypes=[np.uint8])(x_NLGF)
    for block in range(x_NLGF.shape[1]):
        values, found, _ = exemplars.exemplar_codes(out, block)
        peaks = -np.sort(-x_NLGF[:, block].max(axis=1), axis=0)[:15].T
        kept = peaks.shape[1]
        assert (values[:, :kept] == peaks).all()
        assert (values[:, kept:] == -np.inf).all()
        assert (found[:, kept:] == -1).all()
        counted = exemplars.histogram(out, block)
        assert (counted.sum(axis=1) == len(x_NLGF) * 16).all()
        for f in (0, 7):
            assert (counted[f] == np.bincount(codes[:, block, :, f].ravel(), minlength=256)).all()
    assert class_means.class_means(out).counts.sum() == len(x_NLGF)
    N, L, _, F = x_NLGF.shape
    assert exemplars.exemplars(out).height == min(15, N) * L * F


def test_without_a_single_good_image_there_is_nothing_to_read(make_shards, tmp_path):
    def damage(samples):
        for one in samples:
            one.members["jpg"] = b"no picture"

    out = tmp_path / "store"
    extract(prepare(settings(), [str(s) for s in make_shards((3,), change=damage)]), out)
    assert exemplars.exemplars(out).is_empty()
    with pytest.raises(UsageError, match="No image"):
        exemplars.thresholds(out, 0.5)
    with pytest.raises(UsageError, match="No image"):
        class_means.class_means(out)


def test_what_does_not_fit_is_refused(make_shards):
    with pytest.raises(UsageError, match="--cuda-graph"):
        settings(device="cuda", cuda_graph=True)
    with pytest.raises(UsageError, match="drop-context"):
        settings(intervene="drop-context")
    gated = replace(settings(), model="vit_giant_patch14_dinov2")
    with pytest.raises(ModelError, match=r"GluMlp.* without --reduce neurons"):
        prepare(gated, [str(s) for s in make_shards((2,))])
