"""The head of dense prediction: sizes, shapes, which layer feeds which map, and no dependence between images."""

from __future__ import annotations

import pytest
import torch

from sam3lora.model.dense.head import DenseHead, LightBlock


def head_of(channels: int = 16, num_outputs: int = 3, seed: int = 0, **options) -> DenseHead:
    torch.manual_seed(seed)
    return DenseHead(channels, num_outputs, **{"width": 32, **options})


def tokens_of(num_layers: int = 1, images: int = 3, side: int = 4, channels: int = 16) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [5 * torch.randn(images, side**2, channels, generator=generator) for _ in range(num_layers)]


def test_number_of_parameters():
    # Counted by hand: 4 x (1024 x 128 + 128) to reduce, blocks of 13,152 and 3 x 34,112, three outputs, a layer norm.
    with torch.device("meta"):
        head = DenseHead(1024, 1)
        shared = DenseHead(1024, 1, num_layers=4)
        tiny = DenseHead(128, 14, width=64, num_layers=2)
    assert sum(one.numel() for one in head.parameters()) == 524_800 + 13_152 + 3 * 34_112 + 3 * 129 + 2048  # 0.64 M
    assert sum(one.numel() for one in shared.parameters()) == 642_723 + 3 * 2048
    assert sum(one.numel() for one in tiny.parameters()) == 66_362
    assert not list(head.buffers())


@pytest.mark.parametrize("side", [16, 24, 72])
@pytest.mark.parametrize("num_outputs", [1, 5])
def test_shapes(side, num_outputs):
    with torch.device("meta"):
        head = DenseHead(1024, num_outputs)
        logits = head([torch.empty(2, side**2, 1024)], 3)
    assert [tuple(one.shape) for one in logits] == [(2, num_outputs, s, s) for s in (4 * side, 2 * side, side)]


@pytest.mark.parametrize("training", [False, True])
def test_an_image_depends_on_no_other(training):
    # To the last bit where others take the place of the others; alone, but for rounding.
    head, [tokens] = head_of().train(training), tokens_of()
    others = torch.cat([-9 * tokens[:1], tokens[1:2], 100 * tokens[:1]])
    for one, expected in zip(head([others], 3), head([tokens], 3), strict=True):
        assert torch.equal(one[1], expected[1])
    head.double()
    for one, expected in zip(head([tokens[1:2].double()], 3), head([tokens.double()], 3), strict=True):
        torch.testing.assert_close(one[0], expected[1], rtol=0, atol=1e-9)


def test_batch_norm_depends_on_the_others():
    # In training only, as the original does; a trained head has running statistics.
    head, [tokens] = head_of(norm="batch"), tokens_of()
    assert (head.train()([tokens])[0][:1] - head([tokens[:1]])[0]).abs().max() > 1e-3
    head.eval()
    torch.testing.assert_close(head([tokens])[0][:1], head([tokens[:1]])[0], rtol=0, atol=1e-6)
    # epsilon is small, unlike the original's 1 in two of four norms
    assert {module.eps for module in head.modules() if isinstance(module, torch.nn.BatchNorm2d)} == {1e-5}


def test_coarser_outputs_change_nothing_of_the_finest():
    head, tokens = head_of(), tokens_of()
    [alone] = head(tokens)
    assert torch.equal(head(tokens, 3)[0], alone)
    assert len(head(tokens, 2)) == 2


@pytest.mark.parametrize(
    ("num_layers", "expected"),
    [(1, [[0, 1, 2, 3]]), (2, [[0, 1], [2, 3]]), (3, [[0, 1], [2], [3]]), (4, [[0], [1], [2], [3]])],
)
def test_which_map_reads_which_layer(num_layers, expected):
    # The finest map reads the first layer, the coarsest the last.
    head, tokens = head_of(num_layers=num_layers), tokens_of(num_layers)
    found = []
    for layer in range(num_layers):
        head.zero_grad()
        only = [one if number == layer else torch.zeros_like(one) for number, one in enumerate(tokens)]
        head(only)[0].square().sum().backward()
        found.append([number for number, one in enumerate(head.reduce) if one.weight.grad.abs().max() > 0])
    assert found == expected


def test_the_size_of_tokens_does_not_matter():
    # Tokens of the trunk have no norm behind them.
    head, [tokens] = head_of(), tokens_of()
    torch.testing.assert_close(head([tokens])[0], head([100 * tokens + 7])[0], rtol=1e-3, atol=1e-4)


def test_a_pixel_sees_its_own_place():
    # A changed token moves the logits around it most: the maps lie on one another.
    head, [tokens] = head_of(num_outputs=1), tokens_of(images=1, side=16)
    changed = tokens.clone()
    changed[0, 4 * 16 + 11] += 10 * torch.randn(16, generator=torch.Generator().manual_seed(2))
    for logits, other in zip(head([tokens], 3), head([changed], 3), strict=True):
        difference = (logits - other)[0, 0].abs()
        scale = len(difference) // 16
        row, column = divmod(int(difference.flatten().argmax()), len(difference))
        assert (abs(row / scale - 4.5), abs(column / scale - 11.5)) < (2, 2)


def test_every_parameter_learns():
    head = head_of(num_layers=2)
    sum(one.square().sum() for one in head(tokens_of(2), 3)).backward()
    for name, one in head.named_parameters():
        assert one.grad is not None, name
        assert one.grad.abs().max() > 0, name


def test_logits_are_float32_under_autocast():
    head, tokens = head_of(), tokens_of()
    with torch.autocast("cpu", torch.bfloat16):
        low = head(tokens, 3)
    assert {one.dtype for one in low} == {torch.float32}
    for one, exact in zip(low, head(tokens, 3), strict=True):
        torch.testing.assert_close(one, exact, rtol=0, atol=0.1)
    assert head.double()([tokens[0].double()])[0].dtype == torch.float64


def test_block_by_hand():
    # Sixteen channels: four after the squeeze, two kept, two read; the last input has kept, read, once, twice.
    torch.manual_seed(0)
    block = LightBlock(16, 32)
    maps = torch.randn(1, 16, 5, 5)
    squeezed = block.squeeze(maps)
    once = block.first(squeezed[:, 2:])
    expected = block.expand(torch.cat([squeezed, once, block.second(once)], dim=1))
    assert torch.equal(block(maps), expected)
    assert (block.first[0].groups, block.first[1].num_groups, block.expand[1].num_groups) == (2, 2, 8)


def test_what_does_not_fit():
    for options in ({"width": 48}, {"width": 0}, {"num_layers": 5}, {"num_layers": 0}, {"num_levels": 4}):
        with pytest.raises(ValueError, match="expected"):
            head_of(**options)
    head = head_of(num_levels=2)
    for tokens, levels in ((tokens_of(2), 1), (tokens_of(), 3), ([torch.zeros(1, 12, 16)], 1)):
        with pytest.raises(ValueError, match="expected"):
            head(tokens, levels)
