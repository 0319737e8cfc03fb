"""The Triton kernel compiled ahead of time, without a GPU, for the machines it is meant for."""

import re
import subprocess
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource, CompiledKernel  # noqa: E402

from classlens.kernels.class_scores_triton import (  # noqa: E402
    _class_scores_kernel,
    choose_tile,
    compile_options,
)

SM_80, SM_90, SM_100 = (GPUTarget("cuda", arch, 32) for arch in (80, 90, 100))
GFX942 = GPUTarget("hip", "gfx942", 64)
TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def compiled(target: GPUTarget, dtype: torch.dtype, topk: int) -> CompiledKernel:
    """The kernel for ViT-B/16 and 1000 classes as the launcher specialises it."""
    capability = target.arch // 10 if isinstance(target.arch, int) else 9
    tile = choose_tile(dtype, topk, capability)
    signature = {
        "x_ptr": f"*{TYPES[dtype]}",
        "weight_ptr": f"*{TYPES[dtype]}",
        "bias_ptr": "*fp32",
        "labels_ptr": "*i64",
        "rank_ptr": "*i32",
        "label_logit_ptr": "*fp32",
        "lse_ptr": "*fp32",
        "topk_ptr": "*i32" if topk else "constexpr",
        "n_tokens": "i32",
        "stride_n": "i32",
        "stride_t": "i32",
        "eps": "fp32",
    }
    constants = {
        "WIDTH": 768,
        "CLASSES": 1000,
        "TOPK": topk,
        "BLOCK_T": tile.block_t,
        "BLOCK_C": tile.block_c,
        "BLOCK_D": tile.block_d,
    }
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or name.startswith("stride")
    }
    signature |= dict.fromkeys(constants, "constexpr")
    if not topk:
        constants["topk_ptr"] = None
    source = ASTSource(_class_scores_kernel, signature, constants, aligned)
    return triton.compile(source, target=target, options=compile_options(tile))


def bytes_spilled(kernel: CompiledKernel, path: Path) -> int:
    """Bytes of local memory a thread needs: what its registers do not hold.

    On AMD scalar registers may spill into vector registers, which is no memory.
    """
    if "amdgcn" in kernel.asm:
        text = kernel.asm["amdgcn"]
        assert re.findall(r"\.vgpr_spill_count:\s+(\d+)", text) == ["0"]
        (size,) = re.findall(r"\.private_segment_fixed_size:\s+(\d+)", text)
        return int(size)
    path.write_bytes(kernel.asm["cubin"])
    command = [str(CUOBJDUMP), "-res-usage", str(path)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (stack,), (local,) = re.findall(r"STACK:(\d+)", text), re.findall(r"LOCAL:(\d+)", text)
    return int(stack) + int(local)


@pytest.mark.parametrize("target", [SM_80, SM_90, SM_100, GFX942], ids=lambda t: str(t.arch))
def test_default_configuration_spills_nothing(target: GPUTarget, tmp_path: Path) -> None:
    kernel = compiled(target, torch.float16, topk=1)
    assert bytes_spilled(kernel, tmp_path / "kernel.cubin") == 0
    if target is SM_90:
        assert "wgmma.mma_async" in kernel.asm["ptx"]
    if target is SM_100:
        assert "tcgen05.mma" in kernel.asm["ptx"]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("target", [SM_80, SM_90, SM_100, GFX942], ids=lambda t: str(t.arch))
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("topk", [0, 1, 5, 64])
def test_no_configuration_spills(
    target: GPUTarget, dtype: torch.dtype, topk: int, tmp_path: Path
) -> None:
    kernel = compiled(target, dtype, topk)
    assert bytes_spilled(kernel, tmp_path / "kernel.cubin") == 0
    if target is SM_90 and dtype != torch.float32:
        assert "wgmma.mma_async" in kernel.asm["ptx"]
