"""The ADM encoder: a time-conditioned half U-Net that turns an image into features and outputs.

Discriminator guidance uses it twice: as the frozen feature extractor (a noise-robust classifier, read after
its middle block) and, shallow, as the discriminator's head on those features.  Parameter names are the
published ones, so `32x32_classifier.pt` and `discriminator_60.pt` load strictly.

Sources: Dhariwal & Nichol 2021 (arXiv 2105.05233), section 3; Kim et al. 2023 (arXiv 2211.17091).
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from dgutils.errors import require
from dgutils.networks.edm import GroupNorm
from dgutils.noise import INITIALISATION, keyed_rng


def timestep_embedding(time, dim):
    """Sinusoidal embedding (Vaswani et al. 2017, section 3.5), cosines first: time [N] -> [N, dim]."""
    half = dim // 2
    freqs = torch.exp(-math.log(10000.0) / half * torch.arange(half, dtype=time.dtype, device=time.device))
    angles = time[:, None] * freqs  # [N, dim/2]
    return torch.cat([angles.cos(), angles.sin()], dim=1)  # [N, dim]


def zero_init(layer):
    """Start a residual branch as the zero function, so that a fresh block is the identity."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def pointwise(conv, tokens):
    """A kernel-one Conv1d (so the weights were published) on tokens [N, T, C], as a matrix product."""
    return F.linear(tokens, conv.weight.squeeze(-1), conv.bias)


def attend(q, k, v):
    """Scaled dot-product attention: q [N, heads, S, c], k and v [N, heads, T, c] -> [N, heads, S, c]."""
    if q.dtype == torch.bfloat16 and q.device.type == "cpu":  # the fused backward is 6 times slower here
        return torch.softmax(q * q.shape[-1] ** -0.5 @ k.transpose(2, 3), dim=3) @ v
    return F.scaled_dot_product_attention(q, k, v)


def _norm(channels, group_channels):
    """A norm of `channels` in groups of so many, or, for None, in the published 32."""
    return GroupNorm(channels, eps=1e-5, groups=channels // group_channels if group_channels else 32)


class ResBlock(nn.Module):
    """Residual block; time scales and shifts its second norm (adaptive group norm, ADM eq. 3); down: pooled by two."""

    def __init__(self, in_channels, out_channels, embedding_dim, group_channels=None, down=False):
        super().__init__()
        self.down = down
        self.in_layers = nn.Sequential(
            _norm(in_channels, group_channels), nn.SiLU(), nn.Conv2d(in_channels, out_channels, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding_dim, 2 * out_channels))
        # The Identity keeps the published index of the convolution (a dropout of rate 0 stood there).
        self.out_layers = nn.Sequential(
            _norm(out_channels, group_channels), nn.SiLU(), nn.Identity(),
            zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1)))
        same = in_channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x, embedding):  # [N,C,h,w], [N,E]
        (norm1, _, conv1), (norm2, *_, conv2) = self.in_layers, self.out_layers
        h = norm1(x, silu=True)
        if self.down:
            h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)
        h = conv2(norm2(conv1(h), silu=True, adapt=self.emb_layers(embedding).chunk(2, dim=1)))
        return self.skip_connection(x) + h  # [N,C',h',w']


class AttentionBlock(nn.Module):
    """Residual self-attention over positions; each head's q, k, v lie together in the qkv channels."""

    def __init__(self, channels, head_channels, group_channels=None):
        super().__init__()
        self.heads = channels // head_channels
        self.norm = _norm(channels, group_channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = zero_init(nn.Conv1d(channels, channels, 1))

    def forward(self, x, embedding):
        n, c, height, width = x.shape
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # [N,T,C]
        qkv = pointwise(self.qkv, tokens).view(n, -1, self.heads, 3, c // self.heads)
        q, k, v = qkv.permute(3, 0, 2, 1, 4)  # each [N,heads,T,c]
        h = attend(q, k, v).transpose(1, 2).reshape(n, -1, c)  # [N,T,C]
        return x + pointwise(self.proj_out, h).transpose(1, 2).view(n, c, height, width)


class AttentionPool(nn.Module):
    """The mean token asks all tokens (Radford et al. 2021); q, k, v are the outer split of the channels."""

    def __init__(self, num_positions, channels, head_channels, out_channels):
        super().__init__()
        self.heads = channels // head_channels
        self.positional_embedding = nn.Parameter(torch.randn(channels, num_positions + 1) / channels**0.5)
        self.qkv_proj = nn.Conv1d(channels, 3 * channels, 1)
        self.c_proj = nn.Conv1d(channels, out_channels, 1)

    def forward(self, x):
        n, c = x.shape[:2]
        tokens = x.flatten(2).transpose(1, 2)  # [N,T,C]
        tokens = torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1)  # [N,1+T,C]
        tokens = tokens + self.positional_embedding.T
        qkv = pointwise(self.qkv_proj, tokens).view(n, -1, 3, self.heads, c // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [N,heads,1+T,c] each
        h = attend(q[:, :, :1], k, v).reshape(n, c)  # only token 0 is read
        return pointwise(self.c_proj, h)  # [N,out]


class Stage(nn.ModuleList):
    """Layers applied in turn, each given the time embedding."""

    def forward(self, h, embedding):
        for layer in self:
            h = layer(h, embedding)
        return h


class Stem(nn.Conv2d):
    """The first convolution: its output is channels-last, the fast layout, and every later layer keeps that."""

    def forward(self, x, embedding):
        return super().forward(x).contiguous(memory_format=torch.channels_last)


class EncoderUNet(nn.Module):
    """ADM encoder with attention pooling.

    image_size: side of the square input; in_channels, out_channels: of input and output
    model_channels: base width; a level has model_channels * its entry of channel_mult
    num_res_blocks: residual blocks a level, 0 only if all have one width; levels are separated by downsampling ones
    attention_resolutions: downsampling factors (after patching; 1 is the first level) whose blocks attend
    num_head_channels: channels of an attention head; num_classes: 0, or the size of the label embedding
    patch_size: p > 1 folds p x p pixels into channels before the stem, and the grid shrinks p-fold
    num_group_channels: channels of a norm's group; None: every norm has 32 groups, whatever its width, as published

    Every option is kept in `config`; `feature_shape` is (F, h, w) of `features`.
    Raises UserError for options that do not fit together and for inputs of the wrong shape.
    """

    def __init__(self, image_size, in_channels, model_channels, out_channels, num_res_blocks,
                 attention_resolutions, channel_mult, num_head_channels=64, num_classes=0, patch_size=1,
                 num_group_channels=None):
        super().__init__()
        self.config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        widths = [int(mult * model_channels) for mult in channel_mult]
        shrink = patch_size * 2 ** (len(widths) - 1)
        require(image_size % shrink == 0,
                f"image_size {image_size} is not a multiple of {shrink}, which patch_size and levels need")
        require(model_channels > 0 and model_channels % 2 == 0 and num_head_channels > 0, f"model_channels "
                f"{model_channels}, num_head_channels {num_head_channels}: the first is even, both are positive")
        least = int(len(set(widths)) > 1)
        require(num_res_blocks >= least, f"num_res_blocks {num_res_blocks}: at least {least}, as these widths need")
        attended = [w for level, w in enumerate(widths) if 2**level in attention_resolutions] + widths[-1:]
        require(not any(width % num_head_channels for width in attended),
                f"widths {attended} are not all multiples of num_head_channels {num_head_channels}")
        divisor = 32 if num_group_channels is None else num_group_channels
        groups = "32 groups" if num_group_channels is None else f"groups of {num_group_channels} channels"
        require(divisor > 0 and not any(width % divisor for width in widths),
                f"widths {widths} do not divide into {groups} each: num_group_channels must divide all")
        side, embedding_dim = image_size // shrink, 4 * model_channels
        self.feature_shape = (widths[-1], side, side)
        block = partial(ResBlock, embedding_dim=embedding_dim, group_channels=num_group_channels)
        attention = partial(AttentionBlock, head_channels=num_head_channels, group_channels=num_group_channels)

        self.time_embed = nn.Sequential(
            nn.Linear(model_channels, embedding_dim), nn.SiLU(), nn.Linear(embedding_dim, embedding_dim))
        if num_classes:
            self.label_emb = nn.Embedding(num_classes, embedding_dim)

        width = widths[0]
        self.input_blocks = nn.ModuleList([Stage([Stem(in_channels * patch_size**2, width, 3, padding=1)])])
        for level, next_width in enumerate(widths):
            if level > 0:
                self.input_blocks.append(Stage([block(width, width, down=True)]))
            for _ in range(num_res_blocks):
                layers, width = [block(width, next_width)], next_width
                layers += [attention(width)] if 2**level in attention_resolutions else []
                self.input_blocks.append(Stage(layers))
        self.middle_block = Stage([block(width, width), attention(width), block(width, width)])
        self.out = nn.Sequential(_norm(width, num_group_channels), nn.SiLU(),
                                 AttentionPool(side * side, width, num_head_channels, out_channels))

    def features(self, x, vp_time, class_labels=None):
        """Features after the middle block.

        x: VP-scaled images [N, C, H, W]; vp_time: scalar or [N] in [0, 1]; class_labels: int64 [N] for a
        class-conditional network, else None.  Returns [N, *feature_shape].
        """
        size, channels = self.config["image_size"], self.config["in_channels"]
        require(x.ndim == 4 and x.shape[1:] == (channels, size, size),
                f"the encoder takes inputs [N, {channels}, {size}, {size}], got {list(x.shape)}")
        require((class_labels is None) != hasattr(self, "label_emb"),
                "class labels are needed by class-conditional encoders, and only by those")
        dtype = self.time_embed[0].weight.dtype
        time = 999 * torch.as_tensor(vp_time, dtype=dtype, device=x.device).expand(len(x))  # as published
        embedding = self.time_embed(timestep_embedding(time, self.config["model_channels"]))  # [N,E]
        if class_labels is not None:
            embedding = embedding + self.label_emb(class_labels)
        mixed = x.dtype == torch.bfloat16 and torch.is_autocast_enabled(x.device.type)
        h = x if mixed else x.to(dtype)
        if self.config["patch_size"] > 1:  # by one it would be a slow copy that also forgets the layout
            h = F.pixel_unshuffle(h, self.config["patch_size"])  # [N,C p^2,H/p,W/p]
        for block in self.input_blocks:
            h = block(h, embedding)
        return self.middle_block(h, embedding)

    def forward(self, x, vp_time, class_labels=None):
        """Outputs [N, out_channels]: extractor: class logits, head: log-density-ratio. See `features`."""
        return self.out(self.features(x, vp_time, class_labels))


def init_head(config: dict, seed: int, member: int) -> EncoderUNet:
    """A discriminator's fresh head: weights of (seed, member) alone; torch's global generator is left as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(keyed_rng(seed, member, 0, INITIALISATION).integers(2**63)))
        return EncoderUNet(**config)
