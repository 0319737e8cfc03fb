"""Train the demo model: `python -m classlens.bench.demo.train --out FILE`."""

import json
import math
import time
from pathlib import Path

import click
import numpy as np
import timm
import torch
from jaxtyping import Bool, Float, Int64
from safetensors.torch import save_file
from timm.layers.pos_embed_sincos import build_sincos2d_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional

from classlens.bench.demo.model_card import MEAN, MODEL_ARGS, MODEL_NAME, STD
from classlens.bench.demo.prints_data import CLASS_NAMES, Split, draw

BATCH_SIZE = 64
LEARNING_RATE = 1e-3
BETAS = (0.9, 0.98)
WEIGHT_DECAY = 0.05
TOKEN_WEIGHT = 0.1
CLIP_NORM = 1.0
WARMUP_STEPS = 100
DECAY_SHARE = 0.4
# Variation and clutter grow by 1/RAMP_STEPS in every step whose recent loss is below ADVANCE_BELOW:
# straight on full difficulty the loss would stay at its plateau of ln(100) for long.
RAMP_STEPS = 250
ADVANCE_BELOW = 2.5
SMOOTHING = 0.9

LOG_EVERY = 50
VALIDATE_EVERY = 250
CHECKPOINT_EVERY = 100
VALIDATION_PER_CLASS = 5
TEST_PER_CLASS = 50


def make_model() -> VisionTransformer:
    """The untrained demo model.

    The value vectors of its MLPs start from 0, so that they hold only what was learnt: so few steps
    would leave most of them to a random start. The position embedding starts from half a 2-D
    sin-cos one.
    """
    model = timm.create_model(MODEL_NAME, weight_init="jax", **MODEL_ARGS)
    assert isinstance(model, VisionTransformer)
    assert model.pos_embed is not None
    grid = [MODEL_ARGS["img_size"] // MODEL_ARGS["patch_size"]] * 2
    patches_GD = build_sincos2d_pos_embed(grid, MODEL_ARGS["embed_dim"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("mlp.fc2.weight"):
                parameter.zero_()
        model.pos_embed.zero_()
        model.pos_embed[0, 1:] = 0.5 * patches_GD
    return model


def make_batch(
    split: Split,
    labels: list[int],
    seeds: list[int],
    difficulty: float = 1.0,
    clutter: float = 1.0,
) -> tuple[Float[Tensor, "N 3 64 64"], Int64[Tensor, " N"], Bool[Tensor, "N G"]]:
    """Normalised images, their labels, and which patches the cloth covers at least half of.

    There is an image for each (label, seed).
    """
    drawn = [
        draw(split, label, seed, difficulty, clutter)
        for label, seed in zip(labels, seeds, strict=True)
    ]
    images, masks = (np.stack(part) for part in zip(*drawn, strict=True))
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    size = MODEL_ARGS["patch_size"]
    covered = functional.avg_pool2d(torch.from_numpy(masks)[:, None].float(), size)
    return (pixels - mean) / std, torch.tensor(labels), covered.flatten(1) >= 0.5


def cross_entropies(
    model: VisionTransformer,
    images: Float[Tensor, "N 3 64 64"],
    labels_N: Int64[Tensor, " N"],
    on_cloth_NG: Bool[Tensor, "N G"],
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of CLS, and that of image tokens.

    Every token is to say what is at its place (token labelling: Jiang et al., *All Tokens Matter*,
    NeurIPS 2021): one on the cloth its label, one beside it no class more than another.
    """
    tokens_NTD = model.forward_features(images)
    cls_loss = functional.cross_entropy(model.forward_head(tokens_NTD), labels_N)
    logits_NGC = model.head(tokens_NTD[:, 1:])
    labels_NG = labels_N[:, None].expand(on_cloth_NG.shape)
    on_cloth = functional.cross_entropy(logits_NGC[on_cloth_NG], labels_NG[on_cloth_NG])
    beside = -logits_NGC[~on_cloth_NG].log_softmax(dim=1).mean()
    return cls_loss, on_cloth + beside


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, constant, linear decay to 0 over the last 40 %."""
    warmup = min((step + 1) / WARMUP_STEPS, 1.0)
    decay = min((steps - step) / (DECAY_SHARE * steps), 1.0)
    return LEARNING_RATE * warmup * decay


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW with weight decay on the weight matrices alone."""
    decayed, plain = [], []
    for name, parameter in model.named_parameters():
        is_matrix = name.endswith(".weight") and parameter.ndim >= 2
        (decayed if is_matrix else plain).append(parameter)
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": plain}]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, weight_decay=0.0)


@torch.inference_mode()
def count_correct(model: nn.Module, split: Split, images_per_class: int) -> tuple[int, int]:
    """Rightly classified images and images, over seeds 0, 1, … of every class of `split`."""
    model.eval()
    correct = 0
    labels = list(range(len(CLASS_NAMES)))
    for seed in range(images_per_class):
        images, targets, _ = make_batch(split, labels, [seed] * len(labels))
        correct += int((model(images).argmax(dim=1) == targets).sum())
    model.train()
    return correct, images_per_class * len(labels)


def train(model: VisionTransformer, steps: int, seed: int, checkpoint: Path) -> None:
    """Train in place, going on from `checkpoint` where there is one; it is rewritten on the way."""
    optimizer = make_optimizer(model)
    first_step, level, recent_loss = 0, 0.0, math.log(len(CLASS_NAMES))
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first_step, level, recent_loss = state["done"], state["level"], state["recent_loss"]
        click.echo(f"going on from step {first_step} of {checkpoint}")
    start_s = time.perf_counter()
    model.train()
    for step in range(first_step, steps):
        rng = np.random.default_rng([seed, step])
        labels = rng.integers(len(CLASS_NAMES), size=BATCH_SIZE).tolist()
        seeds = rng.integers(2**48, size=BATCH_SIZE).tolist()
        batch = make_batch("train", labels, seeds, difficulty=level, clutter=level)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        cls_loss, token_loss = cross_entropies(model, *batch)
        optimizer.zero_grad(set_to_none=True)
        (cls_loss + TOKEN_WEIGHT * token_loss).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()

        recent_loss = SMOOTHING * recent_loss + (1 - SMOOTHING) * cls_loss.item()
        if recent_loss < ADVANCE_BELOW:
            level = min(level + 1 / RAMP_STEPS, 1.0)
        done = step + 1
        if done % LOG_EVERY == 0 or done == steps:
            step_s = (time.perf_counter() - start_s) / (done - first_step)
            click.echo(
                f"step {done:5d}/{steps}  loss {recent_loss:.3f}  curriculum {level:.2f}  "
                f"{BATCH_SIZE / step_s:.0f} images/s  {step_s * (steps - done) / 60:.1f} min left"
            )
        if done % VALIDATE_EVERY == 0 or done == steps:
            correct, total = count_correct(model, "validation", VALIDATION_PER_CLASS)
            click.echo(f"validation accuracy {correct / total:.4f} ({correct} of {total})")
        if done % CHECKPOINT_EVERY == 0:
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "done": done,
                "level": level,
                "recent_loss": recent_loss,
            }
            partial = checkpoint.with_suffix(".partial")
            torch.save(state, partial)
            partial.replace(checkpoint)


@click.command()
@click.option(
    "--out",
    required=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="Where to write the weights (safetensors, float16).",
)
@click.option("--steps", default=1600, show_default=True, type=click.IntRange(1))
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0))
@click.option(
    "--threads", default=1, show_default=True, type=click.IntRange(1), help="CPU threads."
)
def main(out: Path, steps: int, seed: int, threads: int) -> None:
    """Train the demo model on images of printed cloths, test it once and write its weights.

    A run that was stopped goes on from its checkpoint, which lies beside FILE until the end.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    out.parent.mkdir(parents=True, exist_ok=True)
    model = make_model()
    checkpoint = out.with_suffix(".checkpoint")
    train(model, steps, seed, checkpoint)

    weights = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    model.load_state_dict(weights)  # the test is of the rounded weights, which are what is shipped
    correct, total = count_correct(model, "test", TEST_PER_CLASS)
    click.echo(f"test accuracy {correct / total:.4f} ({correct} of {total})")
    training = {
        "steps": steps,
        "seed": seed,
        "batch_size": BATCH_SIZE,
        "learning_rate": LEARNING_RATE,
        "betas": BETAS,
        "weight_decay": WEIGHT_DECAY,
        "token_weight": TOKEN_WEIGHT,
        "clip_norm": CLIP_NORM,
        "warmup_steps": WARMUP_STEPS,
        "decay_share": DECAY_SHARE,
        "ramp_steps": RAMP_STEPS,
        "advance_below": ADVANCE_BELOW,
        "threads": threads,
        "torch": torch.__version__,
        "timm": timm.__version__,
    }
    metadata = {
        "model_name": MODEL_NAME,
        "model_args": json.dumps(MODEL_ARGS),
        "mean": json.dumps(MEAN),
        "std": json.dumps(STD),
        "training": json.dumps(training),
        "seed": str(seed),
        "test_accuracy": f"{correct / total:.4f}",
        "test_images": str(total),
    }
    save_file(weights, out, metadata)
    checkpoint.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
