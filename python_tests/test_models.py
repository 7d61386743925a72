"""The networks: shapes, starts, and what they refuse."""

from __future__ import annotations

import pytest
import torch

from kfo_ext.networks import CNN, cifar_fs_cnn, omniglot_cnn


@pytest.mark.parametrize("layers", [1, 2, 3, 4, 6])
def test_omniglot_and_cifar_fs_shapes(layers):
    assert omniglot_cnn(layers, ways=7)(torch.rand(3, 1, 28, 28)).shape == (3, 7)
    model = cifar_fs_cnn(layers, hidden=8)
    assert model(torch.rand(3, 3, 32, 32)).shape == (3, 5)
    assert model.features(torch.rand(3, 3, 32, 32)).shape == (3, 8)


def test_flattened_and_pooled_features():
    model = CNN(2, in_channels=3, hidden=4, ways=5, image_size=84, pool=4, mean=False)
    assert model.head.in_features == 4 * 5 * 5
    assert model(torch.rand(2, 3, 84, 84)).shape == (2, 5)


def test_reference_start():
    model = omniglot_cnn(4)
    for block in model.blocks:
        assert not block.conv.bias.any()
        bound = (6 / (9 * (block.conv.in_channels + block.conv.out_channels))) ** 0.5
        assert bound > block.conv.weight.abs().max() > 0.9 * bound
        assert 0 <= block.norm.weight.min() < block.norm.weight.max() <= 1
    assert not model.head.bias.any()
    assert 0.7 < model.head.weight.std() < 1.3
    assert cifar_fs_cnn().head.weight.abs().max() <= (6 / 37) ** 0.5


def test_zero_head_start():
    model = omniglot_cnn(2, init="zero_head")
    assert not model.head.weight.any()
    assert all((block.norm.weight == 1).all() for block in model.blocks)
    assert not model(torch.rand(3, 1, 28, 28)).any()


def test_training_and_evaluation_normalise_alike():
    model, x = omniglot_cnn(2), torch.rand(6, 1, 28, 28)
    assert torch.equal(model.train()(x), model.eval()(x))


def test_channels_last_reaches_every_convolution_and_changes_no_number():
    models = [cifar_fs_cnn(2, hidden=4, channels_last=channels_last).double() for channels_last in (True, False)]
    models[0].load_state_dict(models[1].state_dict())
    seen = []
    for block in models[0].blocks:
        block.conv.register_forward_pre_hook(
            lambda _, inputs: seen.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
        )
    x = torch.rand(3, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(models[0](x), models[1](x), rtol=1e-12, atol=1e-12)
    assert seen == [True, True]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 0}, "layers: expected an integer of at least 1, got 0"),
        ({"hidden": 2.5}, "hidden: expected an integer of at least 1, got 2.5"),
        ({"init": "magic"}, "init: expected one of reference, zero_head, got 'magic'"),
        ({"pool": 4}, "image_size: 2 blocks of stride 1 and pool 4 leave nothing of 8 pixels"),
    ],
    ids=str,
)
def test_bad_networks(change, message):
    with pytest.raises(ValueError, match=message):
        CNN(**{"layers": 2, "in_channels": 1, "hidden": 4, "ways": 5, "image_size": 8, **change})
