"""A transformer block by the fused kernel for CPUs, held to float64 by derived bounds.

Each product is checked from what entered it, as rounded, so that errors do not add up: u, half a
unit in the last place of the activations' dtype, for every operation whose result is rounded.
"""

import numpy as np
import pytest
import torch
from cpu_units import BFLOAT16, FLOAT32, cases
from scoring_cases import exact_space
from torch import Tensor, nn
from torch.nn import functional as F

from classlens.kernels.class_scores import class_scores
from classlens.kernels.class_scores_cpu import ClassScoring
from classlens.kernels.tiles import UNITS, Units
from classlens.kernels.vit_block_cpu import (
    GELU_DEGREES,
    GELU_END,
    GELU_SEGMENTS,
    VitBlockCpu,
    tail_coefficients,
)

U = {BFLOAT16: 2.0**-8, FLOAT32: 2.0**-24}
# Of float32 sums of up to 600 products and of the vector functions: the worst case, and ten
# units, several times what independent errors come to.
SUM = {BFLOAT16: 2.0**-14, FLOAT32: 10 * 2.0**-24}
GELU_OFF = {BFLOAT16: 2.0**-20, FLOAT32: 2.0**-22}
WIDTH, HEADS, HEAD_DIM, HIDDEN = 96, 3, 64, 160  # of heads 192 in all; none a multiple of 128


@pytest.fixture(
    scope="module",
    params=[pytest.param(case.values, id=case.id, marks=case.marks) for case in cases()],
)
def case(request: pytest.FixtureRequest) -> tuple[Units, torch.dtype]:
    return request.param


@pytest.fixture(scope="module")
def units(case: tuple[Units, torch.dtype]) -> Units:
    return case[0]


@pytest.fixture(scope="module")
def dtype(case: tuple[Units, torch.dtype]) -> torch.dtype:
    return case[1]


@pytest.fixture(scope="module")
def modules(dtype: torch.dtype) -> dict[str, nn.Module]:
    return make_modules(dtype)


def make_modules(dtype: torch.dtype) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    made = {
        "norm1": nn.LayerNorm(WIDTH, eps=1e-6),
        "qkv": nn.Linear(WIDTH, 3 * HEADS * HEAD_DIM),
        "proj": nn.Linear(HEADS * HEAD_DIM, WIDTH),
        "norm2": nn.LayerNorm(WIDTH, eps=1e-3),
        "fc1": nn.Linear(WIDTH, HIDDEN),
        "fc2": nn.Linear(HIDDEN, WIDTH, bias=False),
    }
    for module in made.values():
        for parameter in module.parameters():
            parameter.data = (parameter + 0.3 * torch.randn_like(parameter)).to(dtype)
    return made


@pytest.fixture(scope="module")
def block(units: Units, modules: dict[str, nn.Module]) -> VitBlockCpu:
    return VitBlockCpu(units, num_heads=HEADS, **modules)  # pyright: ignore[reportArgumentType]


def inputs(images: int, tokens: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(images, tokens, WIDTH, generator=generator)
    return (x * torch.linspace(0.5, 20, WIDTH) + 3).to(dtype)


def linear64(x: Tensor, linear: nn.Module, off: Tensor | float) -> tuple[Tensor, Tensor]:
    """An exact product and its bound, of rows that are each off by so much at most."""
    weight, bias = linear.weight.double(), linear.bias
    u, sums = U[linear.weight.dtype], SUM[linear.weight.dtype]
    y = F.linear(x, weight, None if bias is None else bias.double())
    size = F.linear(off + sums * x.abs(), weight.abs())
    return y, size + u * (y.abs() + size)


def normalised64(x: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """LayerNorm in float64 and how far its value may lie from it."""
    assert isinstance(norm, nn.LayerNorm)
    u, sums = U[x.dtype], SUM[x.dtype]
    exact = F.layer_norm(
        x.double(), norm.normalized_shape, norm.weight.double(), norm.bias.double(), norm.eps
    )
    return exact, (u + sums) * exact.abs() + sums * norm.bias.double().abs()


def assert_within(actual: Tensor, expected: Tensor, bound: Tensor, least: float = 0.02) -> None:
    off = (actual.double() - expected).abs()
    assert off.isfinite().all()
    assert (off <= bound).all(), (off / bound).max()
    assert (off / bound).max() > least  # or the bound proves nothing


@pytest.mark.parametrize(("images", "tokens"), [(1, 2), (3, 5), (2, 33), (2, 197)])
@pytest.mark.parametrize("scaled", [False, True])
def test_every_product_is_within_its_bound(
    modules: dict[str, nn.Module],
    units: Units,
    images: int,
    tokens: int,
    scaled: bool,
    dtype: torch.dtype,
    poisoned_empty: list[Tensor],
) -> None:
    u, sums = U[dtype], SUM[dtype]
    scales = [torch.linspace(-2, 2, WIDTH, dtype=dtype) * s if scaled else None for s in (1, 3)]
    attn_scale, mlp_scale = scales
    block = VitBlockCpu(
        units,
        num_heads=HEADS,
        **modules,  # pyright: ignore[reportArgumentType]
        attn_scale=attn_scale,
        mlp_scale=mlp_scale,
    )
    x = inputs(images, tokens, block.dtype)
    qkv = block.qkv(x)
    assert any(tensor.data_ptr() == qkv.data_ptr() for tensor in poisoned_empty)
    assert qkv.shape == (3, HEADS, images, tokens, HEAD_DIM)
    by_token = qkv.permute(2, 3, 0, 1, 4).flatten(2)
    assert_within(by_token, *linear64(*normal(x, modules, "norm1", "qkv")))

    heads = block.attention(qkv)
    query, key, value = qkv.transpose(1, 2).double().unbind(0)
    weights = (query @ key.mT / HEAD_DIM**0.5).softmax(dim=-1)
    exact = (weights @ value).transpose(1, 2).flatten(2)
    # The weights and the result are rounded; what scores are off by moves the weights twice.
    scores_off = sums * (query.abs() @ key.abs().mT / HEAD_DIM**0.5).amax(dim=-1, keepdim=True)
    slack = (2 * u + 2 * scores_off + 2 * sums) * (weights @ value.abs())
    assert_within(heads, exact, slack.transpose(1, 2).flatten(2), least=0.002)

    sites = block.after_attention(x, heads, {"attn", "mid", "key_mlp", "mlp", "resid", "others"})
    assert set(sites) == {"attn", "mid", "key_mlp", "mlp", "resid"}
    assert_within(sites["attn"], *scaled64(heads.double(), modules["proj"], attn_scale, 0.0))
    assert torch.equal(sites["mid"], x + sites["attn"])
    assert_within(sites["key_mlp"], *linear64(*normal(sites["mid"], modules, "norm2", "fc1")))
    hidden = F.gelu(sites["key_mlp"].double())
    off = u * hidden.abs() + GELU_OFF[dtype]
    assert_within(sites["mlp"], *scaled64(hidden, modules["fc2"], mlp_scale, off))
    assert torch.equal(sites["resid"], sites["mid"] + sites["mlp"])

    alone = block.after_attention(x, heads)
    assert set(alone) == {"resid"}
    assert torch.equal(alone["resid"], sites["resid"])


def normal(
    x: Tensor, modules: dict[str, nn.Module], norm: str, linear: str
) -> tuple[Tensor, nn.Module, Tensor]:
    exact, off = normalised64(x, modules[norm])
    return exact, modules[linear], off


def scaled64(
    x: Tensor, linear: nn.Module, scale: Tensor | None, off: Tensor | float
) -> tuple[Tensor, Tensor]:
    """`linear64` times a LayerScale, whose product is rounded once more."""
    u = U[linear.weight.dtype]
    y, bound = linear64(x, linear, off)
    if scale is None:
        return y, bound
    size = bound * scale.double().abs()
    return y * scale.double(), size + u * (y * scale.double()).abs() + u * size


def test_a_token_does_not_depend_on_the_batch(block: VitBlockCpu) -> None:
    x = inputs(3, 50, block.dtype)  # 150 rows: a whole group of 128 and a part of one
    qkv = block.qkv(x)
    heads = block.attention(qkv)
    resid = block.after_attention(x, heads)["resid"]
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for image in range(3):
            one = slice(image, image + 1)
            assert torch.equal(block.qkv(x[one]), qkv[:, :, one])
            assert torch.equal(block.attention(qkv[:, :, one]), heads[one])
            assert torch.equal(block.after_attention(x[one], heads[one])["resid"], resid[one])
    torch.set_num_threads(1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so_and_in_its_image(block: VitBlockCpu, bad: float) -> None:
    x = inputs(2, 40, block.dtype)
    heads = block.attention(block.qkv(x))
    good = block.after_attention(x, heads)["resid"]
    x[1, 39, 7] = bad
    heads = block.attention(block.qkv(x))
    resid = block.after_attention(x, heads)["resid"]
    assert torch.equal(resid[0], good[0])
    assert resid[1].isnan().all()  # every token attends to the bad one


def test_extreme_scores_one_token_and_no_images(block: VitBlockCpu) -> None:
    qkv = torch.zeros(3, HEADS, 1, 40, HEAD_DIM, dtype=block.dtype)
    qkv[2] = torch.arange(40)[:, None]
    qkv[1, :, :, 5], qkv[0] = 1e3, 1e3  # all attention to token 5
    assert (block.attention(qkv) == 5).all()
    qkv[1, :, :, 5] = -1e3  # none to it
    mean = (39 * 40 / 2 - 5) / 39
    torch.testing.assert_close(
        block.attention(qkv).float().mean(), torch.tensor(mean), rtol=U[block.dtype], atol=0
    )
    one = block.qkv(inputs(2, 1, block.dtype))  # of one token, whose value is its output
    assert torch.equal(block.attention(one), one[2].permute(1, 2, 0, 3).flatten(2))
    assert block.qkv(inputs(2, 3, block.dtype)[:0]).shape == (3, HEADS, 0, 3, HEAD_DIM)


def test_views_are_read_as_they_are(block: VitBlockCpu) -> None:
    whole = inputs(2, 8, block.dtype)
    assert torch.equal(block.qkv(whole[:, 1:]), block.qkv(whole)[:, :, :, 1:])


@pytest.mark.parametrize("streams", [("resid", "attn", "mlp"), ("mlp", "mid"), ("attn",)])
@pytest.mark.parametrize("topk", [0, 3])
def test_streams_are_scored_as_by_the_kernel_alone(
    block: VitBlockCpu, streams: tuple[str, ...], topk: int, poisoned_empty: list[Tensor]
) -> None:
    """300 rows: two whole groups of 128 and a part; labels of images that share a group."""
    x, labels = inputs(6, 50, block.dtype), torch.tensor([0, 39, 7, 31, 32, 5])
    space = exact_space(40, WIDTH, block.dtype, bias=True)
    heads = block.attention(block.qkv(x))
    heads[4, 49, 3] = float("inf")  # one row that is not finite
    sites = block.after_attention(x, heads, set(streams))
    scoring = ClassScoring(space, labels, block.units, streams=len(streams), tokens=50, topk=topk)
    assert any(scoring.scores.rank.data_ptr() == tensor.data_ptr() for tensor in poisoned_empty)
    resid = block.after_attention(x, heads, scoring=scoring, scored=streams)["resid"]
    torch.testing.assert_close(resid, sites["resid"], rtol=0, atol=0, equal_nan=True)
    expected = [
        class_scores(sites[name], space, labels, topk=topk, impl=block.units) for name in streams
    ]
    for name in ("rank", "label_logit", "logsumexp", "topk"):
        alone = torch.cat([getattr(scores, name) for scores in expected], dim=1)
        scored = getattr(scoring.scores, name)
        torch.testing.assert_close(scored, alone, rtol=0, atol=0, equal_nan=True)
    bad = scoring.scores.rank.unflatten(1, (len(streams), 50)) == 40
    assert bad.nonzero().tolist() == [[4, stream, 49] for stream in range(len(streams))]


@pytest.mark.parametrize(("degree", "off"), [(3, 6e-7), (4, 4e-8)])
def test_the_tail_of_the_normal_distribution(degree: int, off: float) -> None:
    assert degree in GELU_DEGREES.values()
    powers = np.arange(degree, -1, -1)[:, None, None]
    t = np.linspace(0, 1, 101)[:-1]
    fitted = (tail_coefficients(degree).astype(np.float64)[..., None] * t**powers).sum(axis=0)
    places = (np.arange(GELU_SEGMENTS)[:, None] + t) * GELU_END / GELU_SEGMENTS
    exact = torch.special.erfc(torch.from_numpy(places / np.sqrt(2))).numpy() / 2
    assert np.abs(fitted - exact).max() < off
    assert (exact[:, 0] > 1e-9).all()


def test_gelu_of_every_bfloat16(units: Units, dtype: torch.dtype) -> None:
    """fc1 gives each of 96 values to a neuron of its own, fc2 gives it back."""
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    values = bits.view(torch.bfloat16).to(dtype)
    values = values[values.isfinite() & (values.abs() < 1e30)]
    values = F.pad(values, (0, -len(values) % WIDTH)).view(-1, WIDTH)
    one = nn.Linear(WIDTH, WIDTH, bias=False, dtype=dtype)
    one.weight.data = torch.eye(WIDTH, dtype=dtype)
    nothing = nn.Linear(WIDTH, WIDTH, bias=False, dtype=dtype)
    nothing.weight.data.zero_()
    found, expected = [], []
    for row in values:
        norm = nn.LayerNorm(WIDTH, dtype=dtype)
        norm.weight.data.zero_()
        norm.bias.data = row  # so that LayerNorm gives the values
        block = VitBlockCpu(
            units,
            num_heads=1,
            norm1=norm,
            qkv=nn.Linear(WIDTH, 3 * WIDTH, dtype=dtype),
            proj=nothing,
            norm2=norm,
            fc1=one,
            fc2=one,
        )
        x = torch.ones(1, 1, WIDTH, dtype=dtype)
        x[0, 0, 0] = 2
        sites = block.after_attention(x, x, {"key_mlp", "mlp"})
        found.append(sites["mlp"])
        expected.append(F.gelu(sites["key_mlp"].double()))
    found, expected = torch.cat(found).double(), torch.cat(expected)
    bound = U[dtype] * expected.abs() + {BFLOAT16: 6 * 6e-7, FLOAT32: GELU_OFF[FLOAT32]}[dtype]
    assert ((found - expected).abs() <= bound).all()


@pytest.mark.parametrize(("units", "dtype"), cases())
def test_an_mlp_whose_activations_are_not_held_at_once(units: Units, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    width, neurons = 32, {BFLOAT16: 4128, FLOAT32: 1600}[dtype]
    modules = {
        "norm1": nn.LayerNorm(width, dtype=dtype),
        "qkv": nn.Linear(width, 3 * width, dtype=dtype),
        "proj": nn.Linear(width, width, dtype=dtype),
        "norm2": nn.LayerNorm(width, dtype=dtype),
        "fc1": nn.Linear(width, neurons, dtype=dtype),
        "fc2": nn.Linear(neurons, width, dtype=dtype),
    }
    block = VitBlockCpu(units, num_heads=1, **modules)  # pyright: ignore[reportArgumentType]
    x = torch.randn(2, 70, width).to(dtype)
    sites = block.after_attention(x, x, {"mid", "key_mlp", "mlp"})
    assert_within(sites["key_mlp"], *linear64(*normal(sites["mid"], modules, "norm2", "fc1")))
    hidden = F.gelu(sites["key_mlp"].double())
    off = U[dtype] * hidden.abs() + GELU_OFF[dtype]
    assert_within(sites["mlp"], *linear64(hidden, modules["fc2"], off))
    assert torch.equal(sites["resid"], sites["mid"] + sites["mlp"])


@pytest.mark.parametrize("units", UNITS)
def test_what_does_not_fit_is_named(units: Units) -> None:
    modules = make_modules(FLOAT32)
    with pytest.raises(ValueError, match=r"not all multiples of 32"):
        VitBlockCpu(units, num_heads=8, **modules)  # pyright: ignore[reportArgumentType]
    wide = {**modules, "proj": nn.Linear(HEADS * HEAD_DIM, WIDTH, dtype=torch.float16)}
    with pytest.raises(
        ValueError,
        match=r"takes all in bfloat16 or .*, not torch.float16 on cpu, torch.float32 on cpu",
    ):
        VitBlockCpu(units, num_heads=HEADS, **wide)  # pyright: ignore[reportArgumentType]


def test_what_is_not_of_the_dtype_and_width_is_refused(block: VitBlockCpu) -> None:
    for x in (inputs(1, 2, block.dtype).double(), inputs(1, 2, block.dtype)[..., :64]):
        with pytest.raises(ValueError, match=f"width 96 takes {block.dtype} on a CPU, not"):
            block.qkv(x)


def test_a_class_space_of_another_dtype_or_width_is_refused(block: VitBlockCpu) -> None:
    x = inputs(1, 2, block.dtype)
    heads, labels = block.attention(block.qkv(x)), torch.tensor([3])
    other = FLOAT32 if block.dtype == BFLOAT16 else BFLOAT16
    for dtype, width in ((other, WIDTH), (block.dtype, 2 * WIDTH)):
        space = exact_space(40, width, dtype, bias=True)
        scoring = ClassScoring(space, labels, block.units, streams=1, tokens=2, topk=1)
        with pytest.raises(ValueError, match="width 96 takes"):
            block.after_attention(x, heads, scoring=scoring, scored=("resid",))


def test_scores_of_other_units_are_refused(block: VitBlockCpu) -> None:
    x = inputs(1, 2, block.dtype)
    heads, space = block.attention(block.qkv(x)), exact_space(40, WIDTH, block.dtype, bias=True)
    (other,) = set(UNITS) - {block.units}
    scoring = ClassScoring(space, torch.tensor([3]), other, streams=1, tokens=2, topk=1)
    with pytest.raises(ValueError, match=f"packed for {other} do not fit {block.units}"):
        block.after_attention(x, heads, scoring=scoring, scored=("resid",))
