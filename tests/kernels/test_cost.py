from classlens.kernels.cost import Cost, class_scores_cost, vit_forward_cost


def test_figures_of_vit_b_16() -> None:
    """An image's forward pass takes 35.1 GFLOP, its 36 sites (12 blocks × 3 streams) 10.9."""
    assert round(vit_forward_cost(images=1).flops / 1e9, 1) == 35.1
    site = class_scores_cost(images=1, tokens=197, width=768, classes=1000)
    assert round((36 * site.flops) / 1e9, 1) == 10.9


def test_bytes_of_class_scores() -> None:
    cost = class_scores_cost(
        images=2, tokens=3, width=5, classes=7, topk=4, logsumexp=False, bytes_per_value=2
    )
    read = 2 * (2 * 3 * 5) + 2 * (7 * 5) + 4 * 7 + 8 * 2
    written = 2 * 3 * (4 + 4 + 4 * 4)
    assert cost == Cost(flops=2 * 6 * 5 * 7, bytes=read + written)


def test_parameters_of_vit_b_16() -> None:
    """86 M weights of two bytes, next to which an image's pixels and logits are little."""
    one = vit_forward_cost(images=1)
    assert 171e6 < one.bytes < 174e6
    assert vit_forward_cost(images=9).flops == 9 * one.flops


def test_costs_add_and_scale() -> None:
    assert Cost(1, 2) + Cost(3, 4) * 2 == Cost(7, 10)
