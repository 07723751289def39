"""The EDM denoiser: the preconditioning, and the fast group norm."""

import pytest
import torch
import torch._dynamo.testing

from dgutils.errors import UserError
from dgutils.networks import checkpoints, edm
from dgutils.sampler import network_denoiser

TINY = dict(img_resolution=8, img_channels=1, model_channels=16, channel_mult=(1, 2), num_blocks=1,
            attn_resolutions=(4,))  # fmt: skip


def tiny(**changes):
    torch.manual_seed(0)
    network = edm.Denoiser(**(TINY | changes)).eval()
    for parameter in network.parameters():  # a fresh network ends in near-zero layers, which would hide errors
        parameter.data += 0.05 * torch.randn_like(parameter)
    return network


def test_preconditioning_limits():
    """EDM table 1: at sigma -> 0 the denoiser is the identity; at large sigma it forgets the input's scale."""
    network, x = tiny(), torch.randn(2, 1, 8, 8)
    assert (network(x, 1e-6) - x).abs().max() < 1e-4
    far = network(1e4 * x, 1e4)
    assert far.abs().max() < 1e2  # c_skip x = x sigma_data^2 / sigma^2 is gone; c_out F stays


def test_preconditioning_formula():
    network, x, sigma = tiny().double(), torch.randn(3, 1, 8, 8).double(), torch.tensor([0.1, 1.0, 10.0]).double()
    s, d = sigma[:, None, None, None], 0.5
    raw = network.model(x / (s**2 + d**2).sqrt(), sigma.log() / 4)
    expected = d**2 / (s**2 + d**2) * x + s * d / (s**2 + d**2).sqrt() * raw
    assert (network(x, sigma) - expected).abs().max() < 1e-12


@pytest.mark.parametrize("patch_size", [1, 2])
def test_layouts_agree(patch_size):
    """channels-last takes our group norm, contiguous torch's: the same numbers."""
    network, x = tiny(patch_size=patch_size).double(), torch.randn(2, 1, 8, 8).double()
    contiguous = network(x, 0.7)
    assert (network.to(memory_format=torch.channels_last)(x, 0.7) - contiguous).abs().max() < 1e-12


def normed(norm, x, push):
    """GroupNorm's output, and the gradients of <output, push> by input, weight and bias."""
    x = x.detach().requires_grad_()
    y = norm(x)
    return y, *torch.autograd.grad((y * push).sum(), (x, norm.weight, norm.bias))


def test_group_norm_and_its_gradients_match_torch_on_channels_last():
    norm, push = edm.GroupNorm(24).double(), torch.randn(3, 24, 4, 4).double()
    norm.weight.data.normal_()
    norm.bias.data.normal_()
    x = (5 + 2 * torch.randn(3, 24, 4, 4).double()).to(memory_format=torch.channels_last)
    assert norm(x).is_contiguous(memory_format=torch.channels_last)
    for ours, theirs in zip(normed(norm, x, push), normed(norm, x.contiguous(), push), strict=True):
        assert (ours - theirs).abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_group_norm_of_an_image_has_the_same_bits_in_any_batch(dtype):
    norm = edm.GroupNorm(24)
    x = torch.randn(5, 24, 4, 4).to(dtype, memory_format=torch.channels_last)
    assert torch.equal(norm(x), torch.cat([norm(image) for image in x.split(1)]))


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("adapted", [False, True])
def test_the_norm_for_gpus_matches_torch_in_values_and_gradients(silu, adapted):
    """In float64, uncompiled: what the compiler is given is right, and channels-last tensors stay so."""
    norm = edm.GroupNorm(24).double()
    x = (5 + 2 * torch.randn(3, 24, 4, 4).double()).to(memory_format=torch.channels_last).requires_grad_()
    inputs = [x, norm.weight, norm.bias, *(torch.randn(3, 24).double().requires_grad_() for _ in range(2 * adapted))]
    for value in inputs[1:3]:
        value.data.normal_()
    push = torch.randn(3, 24, 4, 4).double()
    ours = norm._by_rows(edm.norm_rows, x, silu, inputs[3:])
    theirs = torch.nn.functional.group_norm(x.contiguous(), norm.num_groups, norm.weight, norm.bias, norm.eps)
    if adapted:
        theirs = theirs * (1 + inputs[3][:, :, None, None]) + inputs[4][:, :, None, None]
    theirs = torch.nn.functional.silu(theirs) if silu else theirs
    assert ours.is_contiguous(memory_format=torch.channels_last) and (ours - theirs).abs().max() < 1e-12
    gradients = [torch.autograd.grad((y * push).sum(), inputs) for y in (ours, theirs)]
    for one, other in zip(*gradients, strict=True):
        assert (one - other).abs().max() < 1e-11
    assert (norm(x, silu, inputs[3:]) - theirs).abs().max() < 1e-12  # and so does the one for CPUs


def test_the_norm_for_gpus_rounds_once():
    """bfloat16 in, bfloat16 out, float32 between: within one rounding of float64's value."""
    norm, x = edm.GroupNorm(64), (3 + torch.randn(4, 64, 8, 8)).bfloat16().to(memory_format=torch.channels_last)
    exact = torch.nn.functional.silu(torch.nn.functional.group_norm(x.double(), norm.num_groups, eps=norm.eps))
    ours = norm._by_rows(edm.norm_rows, x, True, ())
    assert ours.dtype == torch.bfloat16 and ((ours - exact).abs() <= exact.abs() * 2**-8 + 1e-5).all()


def test_the_norm_for_gpus_is_compiled_once_for_layers_of_all_sizes():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    norm = torch.compile(edm.norm_rows, dynamic=True, backend=counter)
    for channels, side in ((64, 16), (128, 8), (192, 32), (384, 4), (64, 4)):
        layer = edm.GroupNorm(channels)
        x = torch.randn(2, channels, side, side).to(memory_format=torch.channels_last)
        assert (layer._by_rows(norm, x, True, ()) - layer(x, silu=True)).abs().max() < 1e-5
    assert counter.frame_count == 1


def test_a_norm_that_does_not_compile_is_one_line_and_torch_s_own(monkeypatch, capsys):
    def broken(*args, **kwargs):
        raise RuntimeError("no compiler here\nand more")

    monkeypatch.setattr(torch, "compile", broken)
    edm._compiled_norm.cache_clear()
    assert edm._compiled_norm() is None and edm._compiled_norm() is None
    assert capsys.readouterr().err == "group norm is not compiled (RuntimeError: no compiler here): slower\n"
    edm._compiled_norm.cache_clear()


def test_the_compiled_norm_is_tried_with_gradients_by_whoever_asks_first(monkeypatch, capsys):
    """Sampling asks without: on the first card its trial failed, and torch's own norm ran (docs/gpu.md)."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    with torch.no_grad():
        assert edm._compiled_norm.__wrapped__("cpu") is edm.norm_rows
    assert not capsys.readouterr().err


def test_group_norm_keeps_statistics_in_float32():
    """bfloat16 in, bfloat16 out: scale and shift round once each, and so does the result, of numbers of order one."""
    norm, x = edm.GroupNorm(64), (3 + torch.randn(4, 64, 8, 8)).bfloat16().to(memory_format=torch.channels_last)
    exact = torch.nn.functional.group_norm(x.double(), norm.num_groups, eps=norm.eps)
    ours = norm(x)
    assert ours.dtype == torch.bfloat16 and (ours - exact).abs().max() < 12 * 2**-8


def test_a_network_computes_in_float32_at_the_noise_levels_that_ask_for_it():
    """On the shipped network that asks, 1 to 20; one image of a batch is enough."""
    network = checkpoints.load_denoiser("fashion-mnist-edm")
    x = torch.randn(4, *network.shape, dtype=torch.float64)
    exact, mixed = (network_denoiser(network, precision) for precision in ("float32", "bfloat16"))
    for levels, same in ((0.9, False), (1.0, True), (20.0, True), (20.1, False), ([0.9, 0.9, 0.9, 2.0], True)):
        sigma = torch.as_tensor(levels, dtype=torch.float64).expand(4)
        assert torch.equal(exact(x, sigma, 0, 1), mixed(x, sigma, 0, 1)) == same, levels


def test_sigma_per_image_is_sigma_one_by_one():
    network, x = tiny(), torch.randn(2, 1, 8, 8)
    both = network(x, torch.tensor([0.3, 3.0]))
    apart = torch.cat([network(x[:1], 0.3), network(x[1:], 3.0)])
    assert (both - apart).abs().max() < 1e-5


def test_class_labels_matter_and_default_to_none():
    network, x = tiny(label_dim=3), torch.randn(1, 1, 8, 8)
    one = network(x, 1.0, torch.eye(3)[:1])
    assert (one - network(x, 1.0)).abs().max() > 1e-5
    assert torch.equal(network(x, 1.0), network(x, 1.0, torch.zeros(1, 3)))


def test_loss_of_the_exact_denoiser_is_the_posterior_variance():
    """For data N(0, 0.25) = sigma_data^2, lambda E|D - y|^2 = lambda s^2 v/(s^2 + v) = 1 at every sigma."""

    class Exact(torch.nn.Module):
        sigma_data = 0.5

        def forward(self, x, sigma):
            return 0.25 / (0.25 + sigma[:, None, None, None] ** 2) * x

    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    loss = edm.edm_loss(Exact(), 0.5 * draw(2000, 1, 4, 4), draw(2000), draw(2000, 1, 4, 4))
    assert abs(loss.item() - 1) < 0.03


def test_wrong_shapes_are_refused():
    with pytest.raises(UserError, match="expected images"):
        tiny()(torch.randn(2, 3, 8, 8), 1.0)
    with pytest.raises(UserError, match="not divisible"):
        edm.Denoiser(**(TINY | dict(img_resolution=9, patch_size=2)))
