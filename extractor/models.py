"""timm model -> its class space, geometry and tokens."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from timm.data.config import resolve_model_data_config
from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from classlens.extractor.config import ExtractConfig
from classlens.extractor.errors import ModelError
from classlens.extractor.geometry import Geometry
from classlens.kernels.class_space import ClassSpace, fold_class_space


@dataclass(frozen=True)
class Subject:
    """The model under study and what is known of it.

    space: float64 class space, final LayerNorm and head folded. prefix_kinds: kind of each prefix
    token. grid: patch rows and columns. weights_sha256: of the weights as loaded, before any cast.
    class_names: one a class where known, else the class numbers.
    """

    model: VisionTransformer
    space: ClassSpace
    geometry: Geometry
    prefix_kinds: tuple[str, ...]
    grid: tuple[int, int]
    weights_sha256: str
    class_names: tuple[str, ...]

    @property
    def blocks(self) -> int:
        """Number of blocks L."""
        return len(self.model.blocks)

    @property
    def heads(self) -> int:
        """Number of attention heads H of a block."""
        return self.model.blocks[0].attn.num_heads  # pyright: ignore


def load_subject(config: ExtractConfig) -> Subject:
    """Makes the model, loads its weights and folds its class space.

    The model is left in float32 on the CPU and in evaluation mode; the caller moves and casts it.

    Raises:
        ModelError: the model cannot be made or loaded, or has no class-embedding space.
    """
    model = _create(config)
    if not isinstance(model, VisionTransformer):
        raise ModelError(
            f"{config.model} is a {type(model).__name__}, not a plain Vision Transformer; choose a "
            "model of timm's VisionTransformer family (vit_*, deit_*, deit3_*)."
        )
    model.eval().requires_grad_(False)
    for index, block in enumerate(model.blocks):
        if type(block) not in (Block, ResPostBlock):
            raise ModelError(
                f"Block {index} of {config.model} is a {type(block).__name__}, which has no "
                "separate attention and MLP step on the residual stream; use a model of plain "
                "(Block) or post-norm (ResPostBlock) blocks."
            )
        if type(block.attn) is not Attention:
            raise ModelError(
                f"Block {index} of {config.model} attends with {type(block.attn).__name__}; use a "
                "model with plain multi-head attention (timm's Attention)."
            )
    size = model.patch_embed.img_size
    assert size is not None
    geometry = (
        Geometry.squash((size[0], size[1]))
        if config.geometry == "squash"
        else Geometry.timm(resolve_model_data_config(model), (size[0], size[1]))
    )
    grid = model.patch_embed.grid_size
    assert grid is not None
    return Subject(
        model=model,
        space=class_space(model, config.model),
        geometry=geometry,
        prefix_kinds=_prefix_kinds(model),
        grid=(grid[0], grid[1]),
        weights_sha256=_weights_sha256(model),
        class_names=_class_names(model),
    )


def class_space(model: VisionTransformer, name: str) -> ClassSpace:
    """The class-embedding space of a model: E and b of its head, with LN_final folded in.

    LN_final is ``model.norm``, or ``model.fc_norm`` where the model norms after pooling (GAP).

    Raises:
        ModelError: there is no linear head, no final LayerNorm, or the head is all zeros.
    """
    norms = [m for m in (model.norm, model.fc_norm) if not isinstance(m, nn.Identity)]
    if len(norms) != 1 or not isinstance(norms[0], nn.LayerNorm):
        found = ", ".join(type(m).__name__ for m in norms) or "none"
        raise ModelError(
            f"{name} needs exactly one final LayerNorm (norm or fc_norm) for its class-embedding "
            f"space, found: {found}; choose another model."
        )
    if not isinstance(model.head, nn.Linear) or model.attn_pool is not None:
        missing = "an attention-pooling head" if model.attn_pool is not None else "no linear head"
        raise ModelError(
            f"{name} has {missing}, so its tokens have no class-embedding space; choose a model "
            "with a linear classifier on the CLS token or on pooled tokens."
        )
    if not model.head.weight.any():
        raise ModelError(
            f"The head of {name} is all zeros, so all logits tie and ranks mean nothing; load "
            "trained weights with --weights."
        )
    norm = norms[0]
    return fold_class_space(norm.weight, norm.bias, norm.eps, model.head.weight, model.head.bias)


def predict(model: VisionTransformer, x: Tensor, kept: Tensor | None = None) -> Tensor:
    """The model's own logits [N, C], from the last block's output [N, T, D].

    Args:
        kept: bool [N, G], the image tokens that are there, one an image at least where the model
            pools them; all when None.
    """
    x = model.norm(x)
    if kept is None or model.global_pool == "token":
        return model.forward_head(x)
    there = F.pad(kept, (model.num_prefix_tokens, 0), value=True)
    return torch.cat([model.forward_head(x[n, there[n]][None]) for n in range(len(x))])


def _create(config: ExtractConfig) -> nn.Module:
    kind, _, argument = config.weights.partition(":")
    try:
        if kind == "pretrained":
            return timm.create_model(config.model, pretrained=True, **config.model_args)
        if kind == "random":
            torch.manual_seed(int(argument or 0))
            return timm.create_model(config.model, pretrained=False, **config.model_args)
        model = timm.create_model(config.model, pretrained=False, **config.model_args)
        model.load_state_dict(_read_weights(Path(config.weights)))
    except (RuntimeError, ValueError, TypeError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{config.model} with weights {config.weights} cannot be loaded ({reason}); check the "
            "name (timm.list_models), --model-arg and --weights (pretrained, random[:seed] or a "
            "file)."
        ) from error
    return model


def _read_weights(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        state = load_file(path)
    else:
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
        for wrapper in ("state_dict", "model"):
            if wrapper in state and isinstance(state[wrapper], dict):
                state = state[wrapper]
    return {name: tensor.float() for name, tensor in state.items()}


def _prefix_kinds(model: VisionTransformer) -> tuple[str, ...]:
    kinds = ["cls"] if model.cls_token is not None else []
    if getattr(model, "dist_token", None) is not None:
        kinds.append("dist")
    kinds += ["register"] * (model.num_prefix_tokens - len(kinds))
    return tuple(kinds)


def _weights_sha256(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _class_names(model: VisionTransformer) -> tuple[str, ...]:
    subset = infer_imagenet_subset(model)
    if subset is None or model.num_classes < 1000:
        return tuple(str(i) for i in range(model.num_classes))
    info = ImageNetInfo(subset)
    return tuple(info.index_to_description(i) for i in range(model.num_classes))
