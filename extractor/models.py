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

from classlens.extractor.class_file import ClassFile, read_class_file
from classlens.extractor.config import ExtractConfig
from classlens.extractor.errors import ModelError
from classlens.extractor.geometry import Geometry
from classlens.kernels.class_space import ClassSpace, fold_class_space

# The paper's checkpoints that timm lacks: that of CIFAR-100 was saved from inside a wrapper, the
# refined DeiT (Naseer et al. 2022) has heads on inner blocks.
WRAPPED = "model."
AUXILIARY_HEADS = "transformerheads."


@dataclass(frozen=True)
class Subject:
    """The model under study and what is known of it.

    space: float64 class space, final LayerNorm and head folded. prefix_kinds: kind of each prefix
    token. grid: patch rows and columns. weights_sha256: of the weights as loaded, before any cast.
    class_names: one a class where known, else the class numbers. classes: the file that the classes
    come from; None for the model's own.
    """

    model: VisionTransformer
    space: ClassSpace
    geometry: Geometry
    prefix_kinds: tuple[str, ...]
    grid: tuple[int, int]
    weights_sha256: str
    class_names: tuple[str, ...]
    classes: ClassFile | None = None

    @property
    def blocks(self) -> int:
        """Number of blocks L."""
        return len(self.model.blocks)

    @property
    def heads(self) -> int:
        """Number of attention heads H of a block."""
        return self.model.blocks[0].attn.num_heads  # pyright: ignore

    def embedding(self) -> Tensor:
        """E [C, D], the class embedding before LN_final is folded in: a copy in float64."""
        weight, _ = class_embedding(self.model, "the model", self.classes)
        return weight.detach().to(torch.float64, copy=True)


def load_subject(config: ExtractConfig) -> Subject:
    """Makes the model, loads its weights and folds its class space.

    The model is left in float32 on the CPU and in evaluation mode; the caller moves and casts it.

    Raises:
        ModelError: the model cannot be made or loaded, or has no class-embedding space.
        UsageError: the file of class embeddings cannot be used with it.
    """
    classes = None if config.classes is None else read_class_file(Path(config.classes))
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
        space=class_space(model, config.model, classes),
        geometry=geometry,
        prefix_kinds=_prefix_kinds(model),
        grid=(grid[0], grid[1]),
        weights_sha256=_weights_sha256(model),
        class_names=_class_names(model) if classes is None else classes.names,
        classes=classes,
    )


def class_space(
    model: VisionTransformer, name: str, classes: ClassFile | None = None
) -> ClassSpace:
    """The class-embedding space of a model: E and b, with LN_final folded in.

    LN_final is ``model.norm``, or ``model.fc_norm`` where the model norms after pooling (GAP).

    Raises:
        ModelError: there is no final LayerNorm, or no class embedding.
        UsageError: the class embeddings of the file have another width than the head's output.
    """
    norms = [m for m in (model.norm, model.fc_norm) if not isinstance(m, nn.Identity)]
    if len(norms) != 1 or not isinstance(norms[0], nn.LayerNorm):
        found = ", ".join(type(m).__name__ for m in norms) or "none"
        raise ModelError(
            f"{name} needs exactly one final LayerNorm (norm or fc_norm) for its class-embedding "
            f"space, found: {found}; choose another model."
        )
    norm = norms[0]
    return fold_class_space(
        norm.weight, norm.bias, norm.eps, *class_embedding(model, name, classes)
    )


def class_embedding(
    model: VisionTransformer, name: str, classes: ClassFile | None = None
) -> tuple[Tensor, Tensor | None]:
    """E [C, D] and b [C] (None for zeros): the model's head, continued by a file's embeddings.

    A file needs no head where its embeddings have the width of the tokens.

    Raises:
        ModelError: there is no linear head, or it is all zeros.
        UsageError: the class embeddings of the file have another width than the head's output.
    """
    head = model.head
    if model.attn_pool is not None:
        raise ModelError(
            f"{name} has an attention-pooling head, so its tokens have no class-embedding space; "
            f"choose {_averaging(name)}."
        )
    if isinstance(head, nn.Identity) and classes is not None:
        classes.require_width(model.num_features, name)
        return classes.embeddings.double(), None
    if not isinstance(head, nn.Linear):
        raise ModelError(
            f"{name} has no linear head, so its tokens have no class-embedding space; choose a "
            "model with a linear classifier on the CLS token or on pooled tokens, or give class "
            "embeddings with --classes."
        )
    if not head.weight.any():
        raise ModelError(
            f"The head of {name} is all zeros, so all logits tie and ranks mean nothing; load "
            "trained weights with --weights."
        )
    if classes is None:
        return head.weight, head.bias
    classes.require_width(head.out_features, name)
    return classes.through_head(head.weight, head.bias)


def predict(
    model: VisionTransformer,
    x: Tensor,
    kept: Tensor | None = None,
    embeddings: Tensor | None = None,
) -> Tensor:
    """The model's own logits [N, C], from the last block's output [N, T, D].

    Args:
        kept: bool [N, G], the image tokens that are there, one an image at least where the model
            pools them; all when None.
        embeddings: T [C', D'] float32 of a file of classes; the logits are then T times what the
            model's head gives, [N, C'] float32.
    """
    x = model.norm(x)
    if kept is None or model.global_pool == "token":
        output = model.forward_head(x)
    else:
        there = F.pad(kept, (model.num_prefix_tokens, 0), value=True)
        output = torch.cat([model.forward_head(x[n, there[n]][None]) for n in range(len(x))])
    return output if embeddings is None else output.float() @ embeddings.T


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
    if all(name.startswith(WRAPPED) for name in state):
        state = {name.removeprefix(WRAPPED): tensor for name, tensor in state.items()}
    return {
        name: tensor.float()
        for name, tensor in state.items()
        if not name.startswith(AUXILIARY_HEADS)
    }


def _prefix_kinds(model: VisionTransformer) -> tuple[str, ...]:
    kinds = ["cls"] if model.cls_token is not None else []
    if getattr(model, "dist_token", None) is not None:
        kinds.append("dist")
    kinds += ["register"] * (model.num_prefix_tokens - len(kinds))
    return tuple(kinds)


def _averaging(name: str) -> str:
    """The variant of a SigLIP tower that averages its tokens, or a description of such models."""
    variant = name.partition(".")[0].replace("_siglip_", "_siglip_gap_")
    if timm.is_model(variant):
        return f"{variant}, which averages the tokens and is scored with --classes"
    return "a model that classifies by its CLS token or by averaged tokens"


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
