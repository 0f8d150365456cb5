import copy

import pytest
import torch
from torch.func import functional_call

from rpg.tasks.images.config import FinetuneConfig, Stage
from rpg.tasks.images.networks import build_network
from rpg.tasks.images.training import binary_start, finetune_many, learning_rate_share, task_losses
from rpg.tasks.side_by_side import SideBySide, repeat, stack, unstack


def network_of(name="cnn", outputs=2, seed=0):
    torch.manual_seed(seed)
    return build_network(name, in_channels=1, image_size=8, num_classes=outputs)


@pytest.mark.parametrize("name", ["cnn", "vit"])
def test_side_by_side_equals_a_loop(name):
    networks = [network_of(name, seed=seed).eval() for seed in range(3)]
    images = torch.randn(5, 1, 8, 8)
    together = SideBySide(networks[0])(stack([each.state_dict() for each in networks]), images)
    torch.testing.assert_close(together, torch.stack([each(images) for each in networks]), rtol=1e-4, atol=1e-5)


def gradients(weights, loss):
    leaves = {name: value.detach().clone().requires_grad_() for name, value in weights.items()}
    loss(leaves).backward()
    return {name: value.grad for name, value in leaves.items()}


@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 16)])
def test_small_cnns_have_the_gradients_of_a_loop_also_where_pixels_are_equal(channels, size):
    networks = [build_network("cnn", in_channels=channels, image_size=size, num_classes=2) for _ in range(3)]
    images = torch.randn(4, channels, size, size).relu()  # half of all pixels are 0, as a digit's background is
    images[0] = 0.0
    found = gradients(
        stack([each.state_dict() for each in networks]), lambda own: SideBySide(networks[0])(own, images).square().sum()
    )
    for number, network in enumerate(networks):
        alone = gradients(
            network.state_dict(),
            lambda own, network=network: functional_call(network, own, (images,)).square().sum(),
        )
        for name, value in alone.items():
            torch.testing.assert_close(found[name][number], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("whole", [False, True])
def test_what_networks_have_in_common_is_computed_once_to_the_same_logits_and_gradients(whole):
    """A body of one memory for all networks; its gradient is the sum over them."""
    network, images, calls = network_of(), torch.randn(5, 1, 8, 8), []
    own = set() if whole else {"linear2.weight", "linear2.bias"}
    heads = {
        name: torch.randn(3, *value.shape) if name in own else value for name, value in network.state_dict().items()
    }

    def loss(weights, apart):
        stacked = {n: v if n in own else v.expand(3, *v.shape) for n, v in weights.items()}
        if apart:
            stacked = {name: value.clone() for name, value in stacked.items()}
        side = SideBySide(network)
        side.network.conv1.register_forward_hook(lambda module, given, made: calls.append(tuple(made.shape)))
        return side(stacked, images).square().sum()

    torch.testing.assert_close(
        gradients(heads, lambda each: loss(each, False)), gradients(heads, lambda each: loss(each, True)),
        rtol=1e-3, atol=1e-4,
    )  # fmt: skip
    assert calls == [(5, 8, 8, 8)]  # the other way needs no convolution


def test_each_network_on_its_own_images():
    networks = [network_of(seed=seed).eval() for seed in range(2)]
    images = torch.randn(2, 5, 1, 8, 8)
    together = SideBySide(networks[0])(stack([each.state_dict() for each in networks]), images)
    torch.testing.assert_close(together[1], networks[1](images[1]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(5, 1, 8, 8), (3, 5, 1, 8, 8)])
def test_large_networks_run_one_after_the_other_to_the_same_logits_and_gradients(shape):
    networks = [network_of("vit", seed=seed) for seed in range(3)]
    images, found = torch.randn(shape), []
    for is_large in (False, True):
        side = SideBySide(networks[0])
        assert not side.is_large
        side.is_large = is_large
        weights = {n: v.requires_grad_() for n, v in stack([each.state_dict() for each in networks]).items()}
        logits = side(weights, images)
        logits.square().sum().backward()
        found.append((logits, {name: value.grad for name, value in weights.items()}))
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-4)


def test_vit_tiny_counts_as_large():
    assert SideBySide(network_of("vit-tiny")).is_large


def test_a_constant_learning_rate_stays_and_bf16_rounds():
    assert [learning_rate_share(step, Stage(steps=16, schedule="constant")) for step in (0, 15)] == [1.0, 1.0]
    assert learning_rate_share(0, Stage(steps=16)) == 0.1
    network = network_of("vit")
    start, bits = repeat(network.state_dict(), 2), torch.tensor([[1, 0], [0, 1]])
    made = {}
    for precision in ("fp32", "bf16"):
        rng = torch.Generator().manual_seed(0)
        config = FinetuneConfig(stages=(Stage(steps=3, learning_rate=1e-3),), batch_size=8, precision=precision)
        made[precision] = finetune_many(
            SideBySide(network), start, bits,
            lambda num, rng=rng: (torch.randn(num, 1, 8, 8, generator=rng), torch.arange(num) % 2), config,
        )[0]["head.weight"]  # fmt: skip
    assert made["bf16"].dtype == torch.float32 and not torch.equal(made["bf16"], made["fp32"])
    torch.testing.assert_close(made["bf16"], made["fp32"], rtol=0, atol=2e-3)


@pytest.mark.parametrize("is_large", [False, True])
def test_some_images_at_a_time_give_the_same_networks(is_large):
    """Seven images in parts of three: a part's share of the loss is its share of the images."""
    network = network_of()
    start, bits = repeat(network.state_dict(), 2), torch.tensor([[1, 0, 0], [0, 1, 1]])
    made = []
    for num in (None, 3):
        rng = torch.Generator().manual_seed(0)
        config = FinetuneConfig(
            stages=(Stage(steps=4, learning_rate=1e-3),), batch_size=7, images_at_a_time=num, loss="focal"
        )
        side = SideBySide(network)
        side.is_large = is_large
        made.append(finetune_many(
            side, start, bits, lambda num, rng=rng: (torch.randn(num, 1, 8, 8, generator=rng), torch.arange(num) % 3),
            config,
        )[0])  # fmt: skip
    torch.testing.assert_close(made[1], made[0], rtol=1e-3, atol=1e-4)
    assert not torch.equal(made[0]["conv1.weight"], start["conv1.weight"])


@pytest.mark.parametrize("loss", ["cross_entropy", "focal"])
def test_finetuning_together_equals_finetuning_alone(loss):
    """Against a plain loop with PyTorch's optimizer; also tells if gradients reach the fused optimizer in disorder."""
    config = FinetuneConfig(
        stages=(Stage(steps=3, learning_rate=1e-2, only=("linear2.*",)), Stage(steps=6, learning_rate=3e-3)),
        batch_size=16, loss=loss, checkpoints=2, tail=0.5,
    )  # fmt: skip
    bits = torch.tensor([[1, 0, 0], [0, 1, 1]])
    base = network_of(outputs=3).state_dict()

    def draw_from(seed):
        rng = torch.Generator().manual_seed(seed)
        return lambda num: (
            torch.randn(num, 1, 8, 8, generator=rng), torch.randint(3, (num,), generator=rng)
        )  # fmt: skip

    network = network_of()
    start = binary_start(base, network, bits)
    kept = finetune_many(SideBySide(network), start, bits, draw_from(1), config)
    assert len(kept) == 2
    for task in range(2):
        alone = copy.deepcopy(network)
        alone.load_state_dict(unstack(start)[task])
        draw, snapshots = draw_from(1), []
        for number, stage in enumerate(config.stages):
            trained = [p for n, p in alone.named_parameters() if number == 1 or n.startswith("linear2")]
            optimizer = torch.optim.AdamW(trained, lr=1.0, betas=(0.9, 0.99), weight_decay=stage.weight_decay)
            for step in range(stage.steps):
                images, classes = draw(16)
                cosine = torch.cos(torch.tensor(step / stage.steps * torch.pi)).item()
                optimizer.param_groups[0]["lr"] = stage.learning_rate * (step + 1) / 10 * (1 + cosine) / 2
                optimizer.zero_grad()
                logits = functional_call(alone, dict(alone.named_parameters()), (images,))
                task_losses(logits[None], bits[task, classes][None], config).sum().backward()
                optimizer.step()
                snapshots.append({name: value.detach().clone() for name, value in alone.state_dict().items()})
        for name in start:
            # the last half of six steps in two stretches: 3 → 4 (round 4.5) and 4 → 6
            late = torch.stack([each[name] for each in snapshots[-3:]])
            torch.testing.assert_close(kept[1][name][task], late[1:].mean(0), rtol=1e-3, atol=1e-5)


def test_the_start_is_the_mean_of_each_sides_rows():
    base = network_of(outputs=3).state_dict()
    start = binary_start(base, network_of(), torch.tensor([[1, 0, 1]]))
    rows = base["linear2.weight"]
    torch.testing.assert_close(start["linear2.weight"][0], torch.stack([rows[1], (rows[0] + rows[2]) / 2]))
    torch.testing.assert_close(start["conv1.weight"][0], base["conv1.weight"])


def test_stacking_and_unstacking_are_inverse():
    state = network_of().state_dict()
    again = unstack(repeat(state, 2))
    assert all(torch.equal(again[1][name], value) for name, value in state.items())
