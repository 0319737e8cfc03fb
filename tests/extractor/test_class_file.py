"""Class embeddings from a file, through the heads of CLIP-like and SigLIP-like towers."""

import json

import numpy as np
import polars as pl
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn
from variants import SMALL, config

from classlens.extractor.blocks import walk
from classlens.extractor.class_file import read_class_file
from classlens.extractor.config import ExtractConfig
from classlens.extractor.errors import ConfigMismatchError, ModelError, UsageError
from classlens.extractor.models import load_subject
from classlens.extractor.pictures import read_pictures
from classlens.extractor.prepare import prepare, prepare_again
from classlens.extractor.run import extract
from classlens.extractor.schema import read_attributes
from classlens.extractor.scorer import Scorer
from classlens.extractor.store import verify
from classlens.kernels.bounds import logit_error

CLASSES = 13
# Name: (timm name, model arguments, width D' of what its head gives).
TOWERS = {
    "clip": ("vit_base_patch16_clip_224.openai", {"num_classes": 24}, 24),
    "quick-clip": ("vit_base_patch16_clip_quickgelu_224.openai", {"num_classes": 24}, 24),
    "siglip-gap": ("vit_base_patch16_siglip_gap_224.webli", {"num_classes": 0}, 48),
    "cls": ("vit_tiny_patch16_224", {"num_classes": 24}, 24),
    "no-head": ("vit_tiny_patch16_224", {"num_classes": 0}, 48),
    "fc-norm": (
        "vit_tiny_patch16_224",
        {"num_classes": 24, "class_token": False, "global_pool": "avg"},
        24,
    ),
    "distilled": ("deit_tiny_distilled_patch16_224", {"num_classes": 24}, 24),
}


def embeddings(classes: int, width: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Random rows; class 7 equals class 3."""
    rows = torch.randn(classes, width, generator=torch.Generator().manual_seed(classes))
    rows[7] = rows[3]
    return rows.to(dtype)


def tower(name: str, file, **settings) -> ExtractConfig:
    model, arguments, _ = TOWERS[name]
    return ExtractConfig(
        model=model,
        model_args={**SMALL, **arguments},
        classes=str(file),
        **{"weights": "random:3", "batch_size": 16, **settings},
    )


@pytest.fixture
def class_file(tmp_path):
    def write(width: int, **metadata: str):
        path = tmp_path / f"classes{width}.safetensors"
        save_file({"embeddings": embeddings(CLASSES, width)}, path, metadata or None)
        return path

    return write


def defined_logits(model, embeddings_CE: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """T · head(LN(x)) of every token, [N, T, C'], in float64 and from the definition."""
    norm = model.norm if isinstance(model.norm, nn.LayerNorm) else model.fc_norm
    centred = x - x.mean(dim=2, keepdim=True)
    normed = centred / (centred.square().mean(dim=2, keepdim=True) + norm.eps).sqrt()
    normed = normed * norm.weight.double() + norm.bias.double()
    if isinstance(model.head, nn.Linear):
        bias = 0 if model.head.bias is None else model.head.bias.double()
        normed = normed @ model.head.weight.double().T + bias
    return normed @ embeddings_CE.double().T


def tower_without_file(name: str) -> ExtractConfig:
    model, arguments, _ = TOWERS[name]
    return ExtractConfig(model, {**SMALL, **arguments}, "random:3")


def weights_with_biases(name: str, path) -> str:
    """Random weights whose norms and head have no neutral values, as fresh ones do."""
    model, arguments, _ = TOWERS[name]
    torch.manual_seed(3)
    state = timm.create_model(model, **SMALL, **arguments).state_dict()
    for key, value in state.items():
        if key.startswith(("norm.", "fc_norm.", "head.bias", "head_dist.bias")):
            value += 0.3 * torch.randn_like(value)
    save_file(state, path)
    return str(path)


def test_the_towers_differ_in_norm_and_head():
    models = {name: timm.create_model(t[0], **SMALL, **t[1]) for name, t in TOWERS.items()}
    assert isinstance(models["clip"].norm_pre, nn.LayerNorm)
    assert isinstance(models["clip"].head, nn.Linear)
    assert isinstance(models["siglip-gap"].head, nn.Identity)
    assert models["siglip-gap"].cls_token is None
    assert isinstance(models["siglip-gap"].norm, nn.LayerNorm)
    assert isinstance(models["fc-norm"].fc_norm, nn.LayerNorm)


@pytest.mark.parametrize("name", TOWERS)
def test_stored_numbers_are_those_of_the_definition(name, make_shards, class_file, tmp_path):
    width = TOWERS[name][2]
    weights = weights_with_biases(name, tmp_path / "weights.safetensors")
    settings = tower(name, class_file(width), topk=2, weights=weights)
    prepared = prepare(settings, [str(s) for s in make_shards((9,))])
    assert prepared.layout.classes == CLASSES
    summary = extract(prepared, tmp_path / "store")
    assert summary.status == {"ok": 9}
    assert verify(tmp_path / "store") == []

    again = prepare_again(tmp_path / "store")
    subject, classes = again.subject, embeddings(CLASSES, width)
    scorer = Scorer(subject, [], dtype=torch.float32, device="cpu", convention="corrected")
    [batch] = read_pictures(again, 16)
    labels = batch.targets.labels
    rank, top1, top2 = (read(tmp_path / "store", f"scores/{a}") for a in ("rank", "top1", "top2"))
    with torch.inference_mode():
        images = scorer.images(batch.pixels)
        for block, sites in walk(subject.model, images, "corrected"):
            for place, stream in enumerate(settings.streams):
                x = sites[stream].double()
                logits = defined_logits(subject.model, classes, x)
                low, high = bracket(logits, x, subject.space, labels)
                stored = torch.from_numpy(rank[:, block, place].astype(np.int64))
                assert ((low <= stored) & (stored <= high)).all()
                first, second = (t[:, block, place] for t in (top1, top2))
                assert (second[first == 3] == 7).all()  # equal classes, the lower one first
                assert (first != 7).all()
        output = subject.model(images)
    expected = (output @ classes.T).argmax(dim=1).numpy()
    assert (read(tmp_path / "store", "images/prediction") == expected).all()


def bracket(logits_NTC, x_NTD, space, labels):
    """Lowest and highest rank by these logits, given the errors that float32 may make."""
    low, high = [], []
    for logits_TC, x_TD, label in zip(logits_NTC, x_NTD, labels.tolist(), strict=True):
        folded_TC, error_TC = logit_error(x_TD, space, torch.float32)
        torch.testing.assert_close(folded_TC, logits_TC, rtol=1e-9, atol=1e-9)
        gap_TC = logits_TC - logits_TC[:, label : label + 1]
        slack_TC = error_TC + error_TC[:, label : label + 1]
        low.append((gap_TC > slack_TC).sum(dim=1))
        high.append((gap_TC >= -slack_TC).sum(dim=1) - 1)
    return torch.stack(low), torch.stack(high)


def read(store, path) -> np.ndarray:
    import zarr

    return np.asarray(zarr.open_array(str(store / path), mode="r")[...])


def test_equal_embeddings_are_equal_classes(class_file):
    for name in ("clip", "siglip-gap"):
        space = load_subject(tower(name, class_file(TOWERS[name][2]))).space
        assert torch.equal(space.weight_CD[7], space.weight_CD[3])
        assert space.bias_C[7] == space.bias_C[3]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_embeddings_of_other_dtypes_are_taken_as_they_are(tmp_path, dtype):
    rows = embeddings(CLASSES, 24, dtype)
    save_file({"embeddings": rows}, tmp_path / "c.safetensors")
    settings = tower("cls", tmp_path / "c.safetensors")
    head = load_subject(tower_without_file("cls")).model.head
    weight, bias = read_class_file(tmp_path / "c.safetensors").through_head(head.weight, head.bias)
    expected = rows.double() @ head.weight.double()
    torch.testing.assert_close(weight, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(bias, rows.double() @ head.bias.double(), rtol=1e-12, atol=1e-12)
    subject = load_subject(settings)
    assert torch.equal(subject.embedding(), weight)
    assert subject.space.num_classes == CLASSES


def test_names_and_source_come_from_the_file(make_shards, class_file, tmp_path):
    shards = [str(s) for s in make_shards((2,))]
    names = [f"a photo of a {i}" for i in range(CLASSES)]
    named = class_file(24, names=json.dumps(names), source="tests")
    prepared = prepare(tower("clip", named), shards)
    extract(prepared, tmp_path / "store")
    assert pl.read_parquet(tmp_path / "store/classes.parquet")["name"].to_list() == names
    attributes = read_attributes(tmp_path / "store")
    assert attributes["class_file"] == {"name": named.name, "source": "tests"}
    lines = tmp_path / "names.txt"
    lines.write_text("\n".join(names))
    with pytest.raises(UsageError, match="--class-names cannot be given with --classes"):
        prepare(tower("clip", named), shards, lines)
    unnamed = prepare(tower("siglip-gap", class_file(48)), shards)
    assert unnamed.class_names == tuple(map(str, range(CLASSES)))
    assert unnamed.subject.classes.source == ""


def test_the_files_content_and_not_its_place_is_in_the_fingerprint(
    make_shards, class_file, tmp_path
):
    shards = [str(s) for s in make_shards((3,))]
    file, out = class_file(24), tmp_path / "store"
    extract(prepare(tower("clip", file), shards), out)
    moved = file.rename(tmp_path / "moved.safetensors")
    assert extract(prepare(tower("clip", moved), shards), out).scored == 0
    rows = embeddings(CLASSES, 24)
    rows[0] += 1
    save_file({"embeddings": rows}, moved)
    with pytest.raises(ConfigMismatchError, match="classes_sha256"):
        extract(prepare(tower("clip", moved), shards), out)
    with pytest.raises(ConfigMismatchError, match="classes_sha256"):
        extract(prepare(tower_without_file("clip"), shards), out)


def test_labels_index_the_files_classes(make_shards, class_file, tmp_path):
    def relabel(samples):
        for sample, label in zip(samples, (12, 13, 0), strict=True):
            sample.members["cls"] = str(label).encode()

    shards = [str(s) for s in make_shards((3,), change=relabel)]
    summary = extract(prepare(tower("siglip-gap", class_file(48)), shards), tmp_path / "store")
    assert summary.status == {"ok": 2, "label_invalid": 1}


def test_another_width_is_refused_with_both_numbers(class_file):
    for name, given, wanted in (("clip", 48, 24), ("siglip-gap", 24, 48)):
        message = f"embeddings of width {given}, the head of {TOWERS[name][0]} gives {wanted}"
        with pytest.raises(UsageError, match=message):
            load_subject(tower(name, class_file(given)))


def test_attention_pooling_is_refused_and_the_averaging_variant_named(class_file):
    siglip = ExtractConfig(
        "vit_base_patch16_siglip_224.webli",
        {**SMALL, "num_classes": 0},
        "random",
        classes=str(class_file(48)),
    )
    with pytest.raises(ModelError, match="choose vit_base_patch16_siglip_gap_224, which averages"):
        load_subject(siglip)


def test_a_model_without_a_head_is_told_of_classes():
    with pytest.raises(ModelError, match=r"no linear head.*--classes"):
        load_subject(tower_without_file("siglip-gap"))


def with_bad_row(value: float) -> torch.Tensor:
    rows = embeddings(CLASSES, 24)
    rows[5] = value
    return rows


GOOD = embeddings(CLASSES, 24)
NAMES = [str(i) for i in range(CLASSES)]


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({"weight": GOOD}, {}, r"no tensor 'embeddings' \(found: weight\); write it with"),
        ({"embeddings": GOOD[0].clone()}, {}, "shape 24 and torch.float32; give"),
        ({"embeddings": GOOD.int()}, {}, "torch.int32; give a floating-point matrix"),
        ({"embeddings": GOOD[:0].clone()}, {}, "shape 0×24"),
        ({"embeddings": with_bad_row(float("nan"))}, {}, "1 rows that are not finite.* row 5"),
        ({"embeddings": with_bad_row(float("inf"))}, {}, "not finite"),
        ({"embeddings": with_bad_row(0.0)}, {}, "all zeros, so that .* row 5; make"),
        ({"embeddings": GOOD}, {"names": "cat, dog"}, "not JSON .*; give 13 names"),
        ({"embeddings": GOOD}, {"names": "{}"}, "not a JSON list of strings"),
        ({"embeddings": GOOD}, {"names": "[1, 2]"}, "not a JSON list of strings"),
        ({"embeddings": GOOD}, {"names": json.dumps(NAMES[1:])}, "12 names for 13 embeddings"),
    ],
)
def test_a_malformed_file_is_named(tmp_path, tensors, metadata, message):
    save_file(tensors, tmp_path / "c.safetensors", metadata)
    with pytest.raises(UsageError, match=message) as caught:
        read_class_file(tmp_path / "c.safetensors")
    assert "\n" not in str(caught.value)


def test_no_file_and_another_kind_of_file(tmp_path):
    for content in (None, b"", b"PK\x03\x04 not safetensors"):
        path = tmp_path / "c.safetensors"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(UsageError, match="no readable safetensors file"):
            load_subject(config("cls", classes=str(path)))
