"""21,841 and more than 65,535 classes, from shards to answers."""

import numpy as np
import polars as pl
import pytest
import torch
import zarr
from safetensors.torch import save_file
from variants import SMALL

from classlens.analysis import scan
from classlens.analysis.identifiability import analyze_identifiability
from classlens.cli import cli
from classlens.extractor.blocks import walk
from classlens.extractor.config import ExtractConfig
from classlens.extractor.pictures import read_pictures
from classlens.extractor.prepare import prepare, prepare_again
from classlens.extractor.run import extract
from classlens.extractor.schema import all_arrays, class_dtype
from classlens.extractor.scorer import Scorer
from classlens.extractor.store import verify
from classlens.kernels.reference import class_scores_reference

HEAD = 16


def test_the_largest_value_is_kept_free():
    assert [class_dtype(c) for c in (1, 65_535, 65_536)] == ["uint16", "uint16", "uint32"]


def settings(tmp_path, classes: int, **more) -> ExtractConfig:
    generator = torch.Generator().manual_seed(classes)
    rows = torch.randn(classes, HEAD, generator=generator)
    save_file({"embeddings": rows}, tmp_path / "classes.safetensors")
    return ExtractConfig(
        "vit_tiny_patch16_224",
        {**SMALL, "depth": 2, "num_classes": HEAD},
        "random:3",
        classes=str(tmp_path / "classes.safetensors"),
        batch_size=8,
        **more,
    )


def labelled(make_shards, labels):
    """One shard with these labels, its last image unreadable."""

    def change(samples):
        for sample, label in zip(samples, labels, strict=True):
            sample.members["cls"] = str(label).encode()
        samples[-1].members["jpg"] = b"no picture"

    return [str(s) for s in make_shards((len(labels),), change=change)]


@pytest.mark.parametrize(("classes", "dtype"), [(21_841, "uint16"), (70_000, "uint32")])
def test_from_shards_to_answers(make_shards, tmp_path, classes, dtype):
    labels = [0, 1, 21_000, classes - 2, classes - 1, classes // 2, 5]
    out = tmp_path / "store"
    config = settings(tmp_path, classes, certify=True, topk=2)
    summary = extract(prepare(config, labelled(make_shards, labels)), out)
    assert summary.status == {"ok": 6, "undecodable": 1}
    assert verify(out) == []

    again = prepare_again(out)
    scorer = Scorer(again.subject, [], dtype=torch.float32, device="cpu", convention="corrected")
    [batch] = read_pictures(again, 8)
    assert batch.targets.labels.tolist() == labels[:-1]
    stored = {a: np.asarray(zarr.open_array(str(out / f"scores/{a}"), mode="r")[...])
              for a in ("rank", "top1", "top2")}  # fmt: skip
    assert {str(values.dtype) for values in stored.values()} == {dtype}
    fills = {spec.path: spec.fill for spec in all_arrays(again.layout)}
    assert fills["scores/rank"] == np.iinfo(dtype).max
    for values in stored.values():
        assert (values[6] == np.iinfo(dtype).max).all()  # the bad image
        assert (values[:6] < classes).all()
    with torch.inference_mode():
        for block, sites in walk(scorer.model, scorer.images(batch.pixels), "corrected"):
            for place, stream in enumerate(config.streams):
                x = sites[stream].double()
                exact = class_scores_reference(x, again.subject.space, batch.targets.labels, topk=2)
                ranks = stored["rank"][:6, block, place].astype(np.int64)
                assert (ranks == exact.rank.numpy()).all()  # certified
                for k in range(2):
                    top = stored[f"top{k + 1}"][:6, block, place].astype(np.int64)
                    assert (top == exact.topk[..., k].numpy()).mean() > 0.99  # float32 may swap
    answers_agree(out, stored["rank"], classes, labels)


def answers_agree(out, rank, classes, labels):
    frame = scan(out).filter(pl.col("stream") == "resid").collect()
    assert frame["rank"].dtype == pl.Int32
    assert (frame["rank"].to_numpy() == rank[:6, :, 0].transpose(1, 0, 2).ravel()).all()
    expected = 1 - frame["rank"].to_numpy() / classes
    assert np.abs(frame["identifiability"].to_numpy() - expected).max() < 1e-15
    assert frame["label"].unique().sort().to_list() == sorted(labels[:-1])
    if classes > 65_536:
        assert (rank[:6] > 65_535).any()
    result = analyze_identifiability(out, permutations=10)
    assert result.classes == classes
    means = result.evolution.filter((pl.col("stream") == "resid") & (pl.col("group") == "patch"))
    assert means["mean"].to_list() == pytest.approx(
        [1 - rank[:6, block, 0, 1:].mean() / classes for block in range(2)]
    )


def test_one_class_fewer_than_the_fill_value(make_shards, tmp_path):
    """65,535 classes: ranks to 65,534 fit beside the fill value; one more class takes 32 bits."""
    for classes, dtype in ((65_535, "uint16"), (65_536, "uint32")):
        out = tmp_path / f"store{classes}"
        config = settings(tmp_path, classes, streams=("resid",))
        extract(prepare(config, labelled(make_shards, [0, classes - 1, 3])), out)
        rank = zarr.open_array(str(out / "scores/rank"), mode="r")
        assert (str(rank.dtype), rank.fill_value) == (dtype, np.iinfo(dtype).max)
        assert scan(out).select(pl.col("rank").max() < classes).collect().item()


def test_the_command_line_names_the_classes(make_shards, tmp_path):
    from click.testing import CliRunner

    config = settings(tmp_path, 70_000)
    arguments = [f"--model-arg={k}={v}" for k, v in config.model_args.items()]
    arguments += [f"--model={config.model}", "--weights=random:3", f"--classes={config.classes}"]
    store = str(tmp_path / "store")
    shards = labelled(make_shards, [69_999, 2, 3])
    command = ["extract", *shards, *arguments, "--out", store]
    assert CliRunner().invoke(cli, command, standalone_mode=False).return_value == 3
    shown = CliRunner().invoke(cli, ["info", store]).stdout
    assert "70,000 of classes.safetensors" in shown
    sql = "SELECT MAX(rank) AS worst, COUNT(*) AS n FROM scores"
    answer = CliRunner().invoke(cli, ["query", store, sql, "--format", "json"]).stdout
    assert '"n":204' in answer.replace(" ", "")  # 2 images × 2 blocks × 3 streams × 17 tokens
