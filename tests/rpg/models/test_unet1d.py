"""The paper's denoiser against a slow obvious twin; its batch normalisation over processes against that of one."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import multiprocessing, nn
from torch.nn import functional as F

from rpg.models.denoiser import time_sinusoid
from rpg.models.unet1d import BatchNorm, UNet1d, UNet1dConfig

D, H, E = 12, 20, 16
CHANNELS = (1, 4, 6, 8, 6, 4, 1)


def small(channels: tuple[int, ...] = CHANNELS, **options) -> UNet1d:
    torch.manual_seed(0)
    denoiser = UNet1d(UNet1dConfig(channels=channels, d_time=E, **options), D, H)
    for parameter in denoiser.parameters():
        nn.init.normal_(parameter, std=0.3)
    return denoiser


def inputs(num: int = 9) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(num, D), torch.rand(num) * 1000, torch.randn(num, H)


class Twin(nn.Module):
    """The published network written out for six convolutions, with PyTorch's own conv1d and BatchNorm1d."""

    def __init__(self, original: UNet1d) -> None:
        super().__init__()
        self.prototype, self.time = copy.deepcopy(original.prototype), copy.deepcopy(original.time)
        self.convolutions, self.norms = nn.ModuleList(), nn.ModuleList()
        for layer in original.layers:
            weight = layer.convolution.weight
            convolution = nn.Conv1d(weight.shape[1], weight.shape[0], 7, padding=3, bias=layer.norm is None)
            convolution.weight.data.copy_(weight[:, :, 0])
            self.convolutions.append(convolution)
            if layer.norm is None:
                convolution.bias.data.copy_(layer.convolution.bias)
            else:
                norm = nn.BatchNorm1d(len(weight))
                norm.weight.data.copy_(layer.norm.weight)
                norm.bias.data.copy_(layer.norm.bias)
                self.norms.append(norm)

    def forward(self, x: torch.Tensor, time: torch.Tensor, prototype: torch.Tensor) -> torch.Tensor:
        c = self.prototype(prototype)[:, None]
        t = self.time.output(F.silu(self.time.hidden(time_sinusoid(time, E))))[:, None]

        def layer(index: int, x: torch.Tensor) -> torch.Tensor:
            return F.elu(self.norms[index](self.convolutions[index]((x + c) * t)))

        first = layer(0, x[:, None])
        second = layer(1, first)
        fourth = layer(3, layer(2, second))
        fifth = layer(4, fourth + second)
        return self.convolutions[5]((fifth + first + c) * t)[:, 0]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_it_is_the_published_network_in_training_and_after(checkpointing):
    denoiser = small(checkpointing=checkpointing)
    twin = Twin(denoiser)
    x, time, prototype = inputs()
    for _ in range(3):
        found, expected = denoiser(x, time, denoiser.precompute(prototype)), twin(x, time, prototype)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        for network, output in ((denoiser, found), (twin, expected)):
            network.zero_grad()
            output.square().sum().backward()
    for layer, convolution in zip(denoiser.layers, twin.convolutions, strict=True):
        gradient = layer.convolution.weight.grad[:, :, 0]
        torch.testing.assert_close(gradient, convolution.weight.grad, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(denoiser.time.output.weight.grad, twin.time.output.weight.grad, rtol=1e-3, atol=1e-3)
    denoiser.eval(), twin.eval()
    torch.testing.assert_close(
        denoiser(x, time, denoiser.precompute(prototype)), twin(x, time, prototype), rtol=1e-4, atol=1e-4
    )


def test_four_convolutions_have_one_skip_connection():
    """The paper's shorter stack: with the last convolution alone in the decoder, its input is layers one and three."""
    denoiser = small((1, 4, 6, 4, 1)).eval()
    x, time, prototype = inputs()
    shift = (denoiser.prototype(prototype) * denoiser.time(time))[:, None, None]
    scale = denoiser.time(time)[:, None, None]
    outputs = [x[:, None, None]]
    for layer in denoiser.layers[:3]:
        outputs.append(layer(outputs[-1], shift, scale)[0])
    expected, _ = denoiser.layers[3](outputs[3] + outputs[1], shift, scale)
    torch.testing.assert_close(denoiser(x, time, denoiser.precompute(prototype)), expected[:, 0, 0])


def test_training_alone_depends_on_the_other_rows():
    denoiser = small()
    x, time, prototype = inputs()
    whole = denoiser(x, time, denoiser.precompute(prototype))
    part = denoiser(x[:4], time[:4], denoiser.precompute(prototype[:4]))
    assert (whole[:4] - part).abs().max() > 1e-2
    denoiser.eval()
    whole = denoiser(x, time, denoiser.precompute(prototype))
    part = denoiser(x[:4], time[:4], denoiser.precompute(prototype[:4]))
    torch.testing.assert_close(whole[:4], part)


def test_recomputing_layers_moves_the_running_statistics_once():
    plain, frugal = small(), small(checkpointing=True)
    x, time, prototype = inputs()
    for denoiser in (plain, frugal):
        denoiser(x, time, denoiser.precompute(prototype)).square().sum().backward()
    for name, buffer in plain.named_buffers():
        assert torch.equal(buffer, frugal.get_buffer(name)) and not torch.equal(buffer, small().get_buffer(name))


def _over_processes(rank: int, size: int, address: str, x: torch.Tensor, results) -> None:
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=size)
    part = x.chunk(size)[rank].clone().requires_grad_()
    results.put((rank, *(tensor.tolist() for tensor in _normalised(part))))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _normalised(x: torch.Tensor) -> list[torch.Tensor]:
    """Output, gradient of the input, running mean and variance after one step."""
    norm = BatchNorm(x.shape[1])
    y, statistics = norm(x)
    norm.track(statistics)
    y.pow(3).sum().backward()
    return [y.detach(), x.grad, norm.running_mean, norm.running_variance]


def test_processes_normalise_as_one_does(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(6, 3, 1, 5) * torch.tensor([0.1, 1, 5])[:, None, None] + 30
    expected = _normalised(x.clone().requires_grad_())
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    arguments = (2, f"file://{tmp_path}/meet", x, results)
    processes = [context.Process(target=_over_processes, args=(rank, *arguments)) for rank in range(2)]
    for process in processes:
        process.start()
    found = sorted(results.get() for _ in processes)
    for process in processes:
        process.join()
    for index, tensor in enumerate(expected):
        parts = [torch.tensor(result[1 + index]) for result in found]
        whole = torch.cat(parts) if index < 2 else parts[0]
        assert index < 2 or torch.equal(parts[0], parts[1])
        torch.testing.assert_close(whole, tensor, rtol=1e-3, atol=2e-3)
