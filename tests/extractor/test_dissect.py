"""Areas of Network Dissection against counting every patch of every image."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import zarr
from test_neurons import activations, settings

from classlens.analysis import scan
from classlens.analysis.neurons import dissection, exemplars
from classlens.extractor.dissect import dissect
from classlens.extractor.errors import ConfigMismatchError, UsageError
from classlens.extractor.prepare import prepare, prepare_again
from classlens.extractor.run import extract
from classlens.extractor.store import verify

QUANTILE = 0.9  # of few images; above 0.995 hardly a patch would be left


def read(store: Path, path: str) -> np.ndarray:
    return np.asarray(zarr.open_array(str(store / path), mode="r")[...])


def both_passes(shards, folder: Path, quantile: float = QUANTILE) -> tuple[Path, Path]:
    store, out = folder / "store", folder / "dissection"
    extract(prepare(settings(), shards), store)
    _, values = exemplars.thresholds(store, quantile)
    dissect(prepare_again(store), store, values, quantile, out)
    return store, out


def drop_masks(samples) -> None:
    del samples[2].members["mask.png"]  # its shard has others: the image fails
    for one in samples[13:]:  # a shard without any: its images are not dissected
        del one.members["mask.png"]


@pytest.mark.parametrize("change", [lambda samples: None, drop_masks])
def test_every_iou_equals_brute_force(make_shards, tmp_path, change):
    shards = [str(s) for s in make_shards((13, 9), change=change)]
    store, out = both_passes(shards, tmp_path)
    x_NLGF, manifest = activations(settings(), shards)
    places, labels = manifest["image"].to_numpy(), manifest["label"].to_numpy()
    ok = read(store, "images/status")[places] == 0
    fraction_NG = read(store, "images/mask_fraction")[places].astype(np.int64)
    masked = ok & np.array([change is not drop_masks or place < 13 for place in range(len(ok))])
    above_NLGF = x_NLGF >= exemplars.thresholds(store, QUANTILE)[1][:, None]
    assert 0 < above_NLGF[ok].mean() <= 0.1
    best = dissection.iou(out)
    for block in range(x_NLGF.shape[1]):
        areas = dissection.areas(out, block)
        assert areas.classes.tolist() == sorted(set(labels[masked].tolist()))
        active_NGF = above_NLGF[masked, block].astype(np.int64)
        for k, label in enumerate(areas.classes):
            of_class_NG = fraction_NG[masked] * (labels[masked] == label)[:, None]
            inside_F = (active_NGF * of_class_NG[:, :, None]).sum(axis=(0, 1))
            active_F = active_NGF.sum(axis=(0, 1)) * 255
            assert (areas.intersection[k] == inside_F).all()
            assert (areas.active == active_F).all()
            assert areas.covered[k] == of_class_NG.sum()
            union_F = active_F + of_class_NG.sum() - inside_F
            assert np.allclose(areas.iou()[k], inside_F / union_F, rtol=1e-15, atol=0)
        rows = best.filter(block=block)
        assert rows["iou"].to_list() == areas.iou().max(axis=0).tolist()
        assert rows["class"].to_list() == areas.classes[areas.iou().argmax(axis=0)].tolist()
        one = dissection.neuron_iou(out, block, 5)
        assert one.height == len(areas.classes)
        assert one.row(0) == rows.row(5)
    table = dissection.detectors(best)
    assert table["detectors"].sum() == (best["iou"] > 0.04).sum() > 0
    assert verify(out) == []
    assert (
        read(out, "images/status")[places].tolist() == read(store, "images/status")[places].tolist()
    )


def test_iou_is_that_of_pixels():
    """Areas by hand: two images of 2 × 2 patches, one neuron, masks that cover parts of patches."""
    areas = dissection.Areas(
        classes=np.array([3, 7], np.int32),
        intersection=np.array([[255 + 51], [0]]),
        active=np.array([3 * 255]),
        covered=np.array([2 * 255, 255]),
    )
    assert areas.iou()[:, 0].tolist() == [306 / (765 + 510 - 306), 0.0]


def test_a_resumed_dissection_keeps_to_its_thresholds(make_shards, tmp_path):
    shards = [str(s) for s in make_shards((5, 4))]
    store, out = both_passes(shards, tmp_path)
    _, values = exemplars.thresholds(store, 0.5)
    with pytest.raises(ConfigMismatchError, match="dissection"):
        dissect(prepare_again(store), store, values, 0.5, out)


def test_what_cannot_be_dissected_is_said(make_shards, tmp_path):
    shards = [str(s) for s in make_shards((4,), mask=False)]
    unmasked, nothing = tmp_path / "unmasked", np.zeros((3, 192), np.float32)
    extract(prepare(settings(), shards), unmasked)
    with pytest.raises(UsageError, match="no segmentation masks"):
        dissect(prepare_again(unmasked), unmasked, nothing, QUANTILE, tmp_path / "out")
    with pytest.raises(UsageError, match="accumulates no dissection"):
        dissection.iou(unmasked)
    prepared = prepare(settings(), [str(s) for s in make_shards((4, 4))])
    whole = tmp_path / "whole"
    extract(prepared, whole)
    next((whole / "_ledger").glob("*.json")).unlink()
    with pytest.raises(UsageError, match="1 of 2 units"):
        dissect(prepared, whole, nothing, QUANTILE, tmp_path / "out")


def test_a_dissection_is_no_store_of_scores(make_shards, tmp_path):
    _, out = both_passes([str(s) for s in make_shards((4,))], tmp_path)
    with pytest.raises(UsageError, match="holds no scores"):
        scan(out)
    assert pl.read_parquet(out / "manifest.parquet").height == 4
