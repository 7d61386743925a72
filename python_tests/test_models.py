"""The networks: shapes, starts, and what they refuse."""

from __future__ import annotations

import pytest
import torch

from kfo_ext.networks import (
    CNN,
    SOFTMAX_WIDTHS,
    LinearModel,
    LinNet,
    TNet,
    cifar_fs_cnn,
    deep_regression,
    logistic_regression,
    mini_imagenet_cnn,
    omniglot_cnn,
    shallow_regression,
    softmax_regression,
)


def count(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# Of a first block (3x3 convolution, bias, batch norm), of a further one, and of the head.
COUNTS = {
    omniglot_cnn: (9 * 32 + 32 + 64, 32 * 9 * 32 + 32 + 64, 32 * 5 + 5),
    cifar_fs_cnn: (27 * 32 + 32 + 64, 32 * 9 * 32 + 32 + 64, 32 * 5 + 5),
    mini_imagenet_cnn: (27 * 64 + 64 + 128, 64 * 9 * 64 + 64 + 128, 1600 * 5 + 5),
}


@pytest.mark.parametrize("layers", [2, 3, 4, 6])
@pytest.mark.parametrize("make", COUNTS)
def test_parameter_counts(make, layers):
    first, further, head = COUNTS[make]
    model = make(layers)
    assert count(model) == first + (layers - 1) * further + head
    hidden, features = model.blocks[0].conv.out_channels, model.head.in_features
    # T is square over output channels; the two layers of LinNet are as wide as the features.
    assert count(TNet(model)) - count(model) == layers * hidden**2 + 5**2
    if features <= 64:
        assert count(LinNet(model, [features] * 2)) - count(model) == 2 * (features + 1) * features


def test_parameter_counts_of_linear_models():
    assert [count(omniglot_cnn(layers)) for layers in (2, 3, 4, 6)] == [9861, 19173, 28485, 47109]
    assert [count(softmax_regression(n)) for n in (784, 3072)] == [3925, 15365]
    deep = [784 * 256 + 256, 256 * 128 + 128, 128 * 64 + 64, 64 * 64 + 64, 64 * 5 + 5]
    assert count(LinNet(softmax_regression(784), SOFTMAX_WIDTHS)) == sum(deep) == 246597
    assert [count(model) for model in (logistic_regression(), LinNet(logistic_regression(), [2, 2]))] == [2, 10]
    assert [count(model) for model in (shallow_regression(), deep_regression(), deep_regression(3))] == [1, 2, 3]


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


@pytest.mark.parametrize(
    ("layers", "sides"),
    [(1, [5]), (2, [21, 5]), (3, [21, 10, 5]), (4, [42, 21, 10, 5]), (6, [42, 21, 10, 5, 5, 5])],
)
def test_mini_imagenet_pools_by_sixteen_at_every_depth(layers, sides):
    model, x = mini_imagenet_cnn(layers, ways=4, hidden=2), torch.rand(2, 3, 84, 84)
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda _, __, y: seen.append(y.shape[-1]))
    assert model(x).shape == (2, 4)
    assert seen == sides
    assert model.head.in_features == 2 * 25


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


def test_torch_start():
    model = omniglot_cnn(2, init="torch")
    assert all((block.norm.weight == 1).all() for block in model.blocks)
    bound = model.head.in_features**-0.5
    assert bound >= model.head.weight.abs().max() > 0.9 * bound
    assert not model.head.bias.any()


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
        ({"init": "magic"}, "init: expected one of reference, zero_head, torch, got 'magic'"),
        ({"pool": 0}, "pool: expected an integer of at least 1, got 0"),
        ({"pool": 1.5}, "pool: expected an integer of at least 1, got 1.5"),
        ({"pool": [2, 0]}, "pool: expected an integer of at least 1, got 0"),
        ({"pool": [2]}, "pool: expected one size for each of 2 blocks"),
        ({"pool": 4}, "image_size: 2 blocks of stride 1 and pool 4 leave nothing of 8 pixels"),
    ],
    ids=str,
)
def test_bad_networks(change, message):
    with pytest.raises(ValueError, match=message):
        CNN(**{"layers": 2, "in_channels": 1, "hidden": 4, "ways": 5, "image_size": 8, **change})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LinearModel(0, 2), "in_features: expected an integer of at least 1, got 0"),
        (lambda: softmax_regression(4, ways=2.0), "out_features: expected an integer of at least 1, got 2.0"),
        (lambda: deep_regression(1), "layers: expected an integer of at least 2, got 1"),
        (lambda: mini_imagenet_cnn(0), "layers: expected an integer of at least 1, got 0"),
    ],
)
def test_bad_linear_networks(make, message):
    with pytest.raises(ValueError, match=message):
        make()
