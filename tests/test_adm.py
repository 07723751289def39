"""The ADM encoder: published names and sizes, attention against its formula, options, and bad inputs."""

import numpy as np
import pytest
import torch

from dgutils.errors import UserError
from dgutils.networks import checkpoints
from dgutils.networks.adm import AttentionBlock, AttentionPool, EncoderUNet, GroupNorm, timestep_embedding
from dgutils.networks.weights import published

PUBLISHED_EXTRACTOR, PUBLISHED_HEAD = published("32x32_classifier").config, published("discriminator_60").config
SMALL = dict(image_size=16, in_channels=2, model_channels=32, out_channels=5, num_res_blocks=1,
             attention_resolutions=(2,), channel_mult=(1, 2), num_head_channels=32)


def randomised(model, dtype=torch.float64):
    """Fresh networks start at zero output; random weights everywhere make every path count."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.to(dtype)


def num_parameters(config):
    with torch.device("meta"):
        return sum(p.numel() for p in EncoderUNet(**config).parameters())


def test_published_parameter_counts():
    # Counted in the published code's EncoderUNetModel; its state dicts load strictly into ours.
    assert num_parameters(PUBLISHED_EXTRACTOR) == 47_771_112
    assert num_parameters(PUBLISHED_HEAD) == 2_883_841
    assert num_parameters({**PUBLISHED_HEAD, "num_classes": 1000}) == 3_395_841


def test_published_names_and_shapes():
    with torch.device("meta"):
        extractor = EncoderUNet(**PUBLISHED_EXTRACTOR)
        head = EncoderUNet(**PUBLISHED_HEAD | {"num_classes": 1000})
    shapes = {name: tuple(value.shape) for name, value in extractor.state_dict().items()}
    assert extractor.feature_shape == (512, 8, 8)
    for name, shape in {
        "time_embed.0.weight": (512, 128),
        "time_embed.2.bias": (512,),
        "input_blocks.0.0.weight": (128, 3, 3, 3),
        "input_blocks.4.1.qkv.weight": (384, 128, 1),
        "input_blocks.5.0.in_layers.2.weight": (128, 128, 3, 3),  # the first downsampling block
        "input_blocks.6.0.skip_connection.weight": (256, 128, 1, 1),
        "input_blocks.6.0.emb_layers.1.weight": (512, 512),
        "input_blocks.14.0.out_layers.3.weight": (512, 512, 3, 3),
        "input_blocks.14.1.proj_out.weight": (512, 512, 1),
        "middle_block.1.norm.weight": (512,),
        "middle_block.2.out_layers.0.bias": (512,),
        "out.0.weight": (512,),
        "out.2.positional_embedding": (512, 65),
        "out.2.qkv_proj.weight": (1536, 512, 1),
        "out.2.c_proj.weight": (1000, 512, 1),
    }.items():
        assert shapes[name] == shape, name
    for absent in ("input_blocks.5.1.qkv.weight", "input_blocks.15.0.in_layers.0.weight"):
        assert absent not in shapes
    assert head.state_dict()["label_emb.weight"].shape == (1000, 512)


def test_group_norm_of_edm_has_published_groups_and_four_channels_in_small_ones():
    groups = {channels: GroupNorm(channels).num_groups for channels in (32, 48, 64, 96, 128, 144, 256, 512)}
    assert groups == {32: 8, 48: 12, 64: 16, 96: 24, 128: 32, 144: 24, 256: 32, 512: 32}


@pytest.mark.parametrize(("channels", "expected"), [(None, {32}), (4, {8, 16}), (32, {1, 2}), (1, {32, 64})])
def test_norms_have_the_published_groups_unless_told_otherwise(channels, expected):
    encoder = EncoderUNet(**SMALL, num_group_channels=channels)
    assert {module.num_groups for module in encoder.modules() if isinstance(module, GroupNorm)} == expected
    assert encoder.config["num_group_channels"] == channels


@pytest.mark.parametrize("name", ["fashion-mnist-adm", "cifar10-adm"])
def test_shipped_encoders_keep_groups_of_four_channels(name):
    norms = [m for m in checkpoints.load_feature_extractor(name).modules() if isinstance(m, GroupNorm)]
    assert norms and all(norm.num_channels == 4 * norm.num_groups for norm in norms)


@pytest.mark.parametrize(("width", "groups"), [(16, 4), (32, 8), (64, 16), (128, 32), (256, 32)])
def test_heads_have_groups_of_four_channels_until_the_published_32_fit(width, groups):
    head = EncoderUNet(**checkpoints.head_config("fashion-mnist-adm", width, 0, 16))
    assert {module.num_groups for module in head.modules() if isinstance(module, GroupNorm)} == {groups}


def test_timestep_embedding_is_cosines_then_sines():
    time, dim = 999 * 0.37, 8
    angles = [time / 10000 ** (k / (dim // 2)) for k in range(dim // 2)]
    expected = np.concatenate([np.cos(angles), np.sin(angles)])
    actual = timestep_embedding(torch.tensor([time], dtype=torch.float64), dim)[0]
    np.testing.assert_allclose(actual.numpy(), expected, rtol=0, atol=1e-12)


def apply(conv, tokens):
    """A kernel-one convolution on tokens [C, T], in NumPy."""
    return conv.weight.detach().numpy()[:, :, 0] @ tokens + conv.bias.detach().numpy()[:, None]


def naive_attention(q, k, v):
    """One head, one image: q [c, S], k and v [c, T] -> [c, S]."""
    weights = np.exp(q.T @ k / np.sqrt(len(q)))  # [S,T]
    return v @ (weights / weights.sum(axis=1, keepdims=True)).T


def test_attention_block_splits_heads_before_qkv():
    block = randomised(AttentionBlock(8, head_channels=4, group_channels=4))
    x = torch.randn(1, 8, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        actual = block(x, None)[0].flatten(1).numpy()
        tokens = block.norm(x)[0].flatten(1).numpy()  # [C,T]
    heads = [naive_attention(h[:4], h[4:8], h[8:]) for h in np.split(apply(block.qkv, tokens), 2)]
    expected = x[0].flatten(1).numpy() + apply(block.proj_out, np.concatenate(heads))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-12)


def test_attention_pool_splits_qkv_before_heads():
    pool = randomised(AttentionPool(6, 8, head_channels=4, out_channels=3))
    x = torch.randn(1, 8, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    tokens = x[0].flatten(1).numpy()
    tokens = np.concatenate([tokens.mean(axis=1, keepdims=True), tokens], axis=1)
    tokens = tokens + pool.positional_embedding.detach().numpy()
    q, k, v = np.split(apply(pool.qkv_proj, tokens), 3)
    pooled = np.concatenate([naive_attention(q[s], k[s], v[s]) for s in (slice(0, 4), slice(4, 8))])
    expected = apply(pool.c_proj, pooled)[:, 0]
    np.testing.assert_allclose(pool(x)[0].detach().numpy(), expected, rtol=0, atol=1e-12)


def test_a_fresh_residual_branch_is_zero():
    torch.manual_seed(0)
    encoder = EncoderUNet(**{**SMALL, "channel_mult": (1,), "attention_resolutions": (1,)})
    x = torch.randn(2, 2, 16, 16)
    with torch.no_grad():
        stem = encoder.input_blocks[0][0](x, None)
        assert torch.equal(encoder.features(x, 0.5), stem)


@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_shapes_scalar_time_and_patches(patch_size):
    encoder = randomised(EncoderUNet(**SMALL, patch_size=patch_size))
    x = torch.randn(3, 2, 16, 16, dtype=torch.float64)
    side = 16 // patch_size // 2
    assert encoder.feature_shape == (64, side, side)
    with torch.no_grad():
        assert encoder.features(x, 0.3).shape == (3, 64, side, side)
        together = encoder(x, 0.3)
        one_by_one = torch.cat([encoder(row[None], torch.tensor([0.3], dtype=torch.float64)) for row in x])
        assert not torch.allclose(together, encoder(x, 0.6), atol=1e-3)
    assert together.shape == (3, 5)
    assert (together - one_by_one).abs().max() < 1e-12


def test_patches_are_channels():
    """An encoder with patches is the plain one on an image whose 2 x 2 patches were made channels."""
    encoder = randomised(EncoderUNet(**{**SMALL, "in_channels": 1}, patch_size=2))
    plain = randomised(EncoderUNet(**{**SMALL, "in_channels": 4, "image_size": 8}))
    plain.load_state_dict(encoder.state_dict())
    x = torch.randn(2, 1, 16, 16, dtype=torch.float64)
    folded = torch.cat([x[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)], dim=1)
    assert (encoder(x, 0.5) - plain(folded, 0.5)).abs().max() < 1e-12


def test_class_conditional_head():
    encoder = randomised(EncoderUNet(**SMALL, num_classes=3))
    x = torch.randn(2, 2, 16, 16, dtype=torch.float64)
    outputs = [encoder(x, 0.5, torch.tensor([0, label])) for label in (0, 2)]
    assert torch.equal(outputs[0][0], outputs[1][0])
    assert (outputs[0][1] - outputs[1][1]).abs().max() > 1e-3
    with pytest.raises(UserError, match="class labels"):
        encoder(x, 0.5)
    with pytest.raises(UserError, match="class labels"):
        randomised(EncoderUNet(**SMALL))(x, 0.5, torch.tensor([0, 1]))


def test_bfloat16_autocast_and_input_gradient_on_cpu():
    encoder = randomised(EncoderUNet(**SMALL), torch.float32).to(memory_format=torch.channels_last)
    x = torch.randn(4, 2, 16, 16, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    exact = encoder(x, 0.5)
    (exact_gradient,) = torch.autograd.grad(exact.sum(), x)
    with torch.autocast("cpu", torch.bfloat16):
        rough = encoder(x, 0.5)
    (gradient,) = torch.autograd.grad(rough.float().sum(), x)
    assert gradient.dtype == torch.float32 and gradient.isfinite().all()
    assert (rough - exact).abs().max() < 0.05 * exact.abs().max()
    cosine = torch.nn.functional.cosine_similarity(gradient.flatten(), exact_gradient.flatten(), dim=0)
    assert cosine > 0.99


def test_user_errors_name_the_remedy():
    encoder = EncoderUNet(**SMALL)
    with pytest.raises(UserError, match=r"\[N, 2, 16, 16\], got \[3, 1, 16, 16\]"):
        encoder(torch.zeros(3, 1, 16, 16), 0.5)
    with pytest.raises(UserError, match=r"got \[2, 16, 16\]"):
        encoder.features(torch.zeros(2, 16, 16), 0.5)
    with pytest.raises(UserError, match="not a multiple of 6"):
        EncoderUNet(**SMALL, patch_size=3)
    with pytest.raises(UserError, match="num_head_channels 64"):
        EncoderUNet(**{**SMALL, "channel_mult": (1,), "num_head_channels": 64})
