import pytest
import timm
import torch
from safetensors.torch import save_file
from variants import SMALL, VARIANTS, config

from classlens.extractor.blocks import block_sites, walk
from classlens.extractor.config import ExtractConfig
from classlens.extractor.errors import ModelError
from classlens.extractor.models import load_subject
from classlens.kernels.reference import logits_reference


@pytest.fixture(params=VARIANTS)
def variant(request):
    return request.param


def test_sites_rebuild_the_models_own_forward(variant):
    subject = load_subject(config(variant))
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    blocks = list(walk(subject.model, images, "corrected"))
    assert [b for b, _ in blocks] == [0, 1, 2]
    before = None
    for _, sites in blocks:
        if before is not None:  # x'_b = x_b + a_b and x_{b+1} = x'_b + m_b
            torch.testing.assert_close(sites["mid"], before + sites["attn"], rtol=0, atol=0)
        torch.testing.assert_close(sites["resid"], sites["mid"] + sites["mlp"], rtol=0, atol=0)
        before = sites["resid"]
    torch.testing.assert_close(subject.model.norm(before), subject.model.forward_features(images))


def test_class_space_gives_the_models_own_logits(variant):
    subject = load_subject(config(variant))
    model = subject.model.double()
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)).double()
    *_, (_, sites) = walk(model, images, "corrected")
    if model.global_pool == "avg":
        pooled = sites["resid"][:, subject.model.num_prefix_tokens :].mean(1)
    else:
        pooled = sites["resid"][:, 0]
    logits = logits_reference(pooled[:, None], subject.space)[:, 0]
    if variant == "distilled":  # the model averages two heads; the class space is the CLS head's
        expected = model.head(model.norm(sites["resid"])[:, 0])
    else:
        expected = model(images)
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)


def test_prefix_tokens_and_grid_are_named(variant):
    subject = load_subject(config(variant))
    assert subject.prefix_kinds == VARIANTS[variant][2]
    assert subject.grid == (4, 4)
    assert subject.geometry.input_size == (32, 32)  # not the 224 of the pretrained data config


def test_layerscale_is_inside_the_attn_site():
    subject = load_subject(config("registers-layerscale-gap"))
    images = torch.randn(2, 3, 32, 32)
    _, sites = next(walk(subject.model, images, "corrected"))
    block = subject.model.blocks[0]
    block.ls1.gamma.data.zero_()
    _, silenced = next(walk(subject.model, images, "corrected"))
    assert sites["attn"].abs().max() > 0
    assert silenced["attn"].abs().max() == 0


def test_vilas2023_norms_the_sublayer_outputs_of_gap_models_only():
    for variant, changes in (("gap", True), ("cls", False)):
        subject = load_subject(config(variant))
        images = torch.randn(2, 3, 32, 32)
        _, plain = next(walk(subject.model, images, "corrected"))
        _, theirs = next(walk(subject.model, images, "vilas2023"))
        block = subject.model.blocks[0]
        for stream, norm in (("attn", block.norm1), ("mlp", block.norm2)):
            expected = norm(plain[stream]) if changes else plain[stream]
            torch.testing.assert_close(theirs[stream], expected, rtol=0, atol=0)
        torch.testing.assert_close(theirs["resid"], plain["resid"], rtol=0, atol=0)


def test_vilas2023_leaves_post_norm_blocks_which_have_normed_already():
    subject = load_subject(config("post-norm-gap"))
    images = torch.randn(2, 3, 32, 32)
    _, plain = next(walk(subject.model, images, "corrected"))
    _, theirs = next(walk(subject.model, images, "vilas2023"))
    for site, value in plain.items():
        torch.testing.assert_close(theirs[site], value, rtol=0, atol=0)


def test_only_the_wanted_sites_are_kept_and_keys_rebuild_their_sublayer(variant):
    subject = load_subject(config(variant))
    block = subject.model.blocks[0]
    x = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(0))
    assert set(block_sites(block, x, {"key_mlp"})) == {"resid", "key_mlp"}
    sites = block_sites(block, x, {"key_mlp", "key_attn", "attn", "mlp"})
    attn = block.attn.proj(sites["key_attn"])
    mlp = block.mlp.fc2(block.mlp.act(sites["key_mlp"]))
    if variant == "post-norm-gap":
        attn, mlp = block.norm1(attn), block.norm2(mlp)
    else:
        attn, mlp = block.ls1(attn), block.ls2(mlp)
    torch.testing.assert_close(attn, sites["attn"])
    torch.testing.assert_close(mlp, sites["mlp"])


@pytest.mark.parametrize(
    ("name", "arguments", "names"),
    [
        ("resnet18", {}, "ResNet"),
        ("vit_base_patch16_siglip_224", {**SMALL, "num_classes": 10}, "attention-pooling"),
        ("vit_tiny_patch16_224", {**SMALL, "num_classes": 0}, "linear head"),
        ("vit_tiny_patch16_224", {**SMALL, "num_classes": 10, "weight_init": "jax"}, "zeros"),
        ("vit_tiny_patch16_224", {**SMALL, "final_norm": False}, "LayerNorm"),
        ("vit_base_patch16_xp_224", {"depth": 1}, "ParallelScalingBlock"),
        ("no_such_model", {}, "cannot be loaded"),
    ],
)
def test_a_model_without_a_class_space_is_named(name, arguments, names):
    with pytest.raises(ModelError, match=names):
        load_subject(ExtractConfig(model=name, model_args=arguments, weights="random"))


def test_weights_from_files_equal_the_saved_ones(tmp_path):
    made = load_subject(config("cls", weights="random:5"))
    state = made.model.state_dict()
    save_file(state, tmp_path / "w.safetensors")
    torch.save({"state_dict": state}, tmp_path / "w.pth")
    torch.save({k: v for k, v in state.items() if k != "norm.weight"}, tmp_path / "part.pth")
    for name in ("w.safetensors", "w.pth"):
        loaded = load_subject(config("cls", weights=str(tmp_path / name)))
        assert loaded.weights_sha256 == made.weights_sha256
    assert load_subject(config("cls", weights="random:6")).weights_sha256 != made.weights_sha256
    for name in ("part.pth", "absent.pth"):
        with pytest.raises(ModelError, match="--weights"):
            load_subject(config("cls", weights=str(tmp_path / name)))


def test_checkpoints_of_the_paper_that_timm_lacks_are_read(tmp_path):
    made = load_subject(config("cls", weights="random:5"))
    state = made.model.state_dict()
    wrapped = {f"model.{name}": tensor for name, tensor in state.items()}
    heads = {"transformerheads.0.norm.weight": torch.ones(3)}
    torch.save(wrapped, tmp_path / "cifar.pth")
    torch.save({"state_dict": state | heads}, tmp_path / "refined.pth")
    for name in ("cifar.pth", "refined.pth"):
        loaded = load_subject(config("cls", weights=str(tmp_path / name)))
        assert loaded.weights_sha256 == made.weights_sha256


def test_class_names_of_imagenet_models():
    subject = load_subject(
        ExtractConfig("vit_tiny_patch16_224", {**SMALL, "num_classes": 1000}, "random")
    )
    assert subject.class_names[0].startswith("tench")
    assert timm.data.ImageNetInfo().num_classes() == len(subject.class_names)
