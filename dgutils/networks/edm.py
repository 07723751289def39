"""The EDM denoiser: DDPM++ U-Net (Song et al. 2021) with EDM preconditioning (Karras et al. 2022, table 1).

One class at every scale: `assets/registry.yaml` has the arguments of NVIDIA's networks, the shipped small ones are
others. Parameter names follow NVlabs' release, so that its weights load unchanged.
"""

import functools
import math
import sys

import torch
from torch import nn
from torch.nn import functional as F

from dgutils.errors import require


def _xavier_uniform(shape, fan_in, fan_out, gain=1.0):
    bound = gain * math.sqrt(6 / (fan_in + fan_out))
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))


class Linear(nn.Linear):
    def __init__(self, fan_in, fan_out, bias=True):
        super().__init__(fan_in, fan_out, bias)
        self.weight = _xavier_uniform((fan_out, fan_in), fan_in, fan_out)
        if bias:
            nn.init.zeros_(self.bias)


class Conv2d(nn.Module):
    """Same-size convolution, optionally after doubling (by repetition) or halving (by averages) the resolution."""

    def __init__(self, fan_in, fan_out, kernel, up=False, down=False, gain=1.0):
        super().__init__()
        area = kernel * kernel
        self.weight = _xavier_uniform((fan_out, fan_in, kernel, kernel), fan_in * area, fan_out * area, gain)
        self.bias = nn.Parameter(torch.zeros(fan_out))
        self.up, self.down = up, down
        if up or down:  # nothing reads it, but files of weights hold it
            self.register_buffer("resample_filter", torch.full((1, 1, 2, 2), 0.25))

    def forward(self, x):
        if self.up:
            x = F.interpolate(x, scale_factor=2, mode="nearest")
        if self.down:
            x = F.avg_pool2d(x, 2)
        return F.conv2d(x, self.weight, self.bias, padding=self.weight.shape[-1] // 2)


def _scale_and_shift(rows, groups, weight, bias, eps):
    """What normalises rows [N, HW, C] is rows scale + shift, both [N, C]: by sums of rows and of their squares."""
    n, positions, c = rows.shape
    size = positions * (c // groups)
    mean = rows.sum(1).view(n, groups, -1).sum(2) / size  # [N, G]
    var = (rows * rows).sum(1).view(n, groups, -1).sum(2) / size - mean**2
    scale = (var.clamp(min=0) + eps).rsqrt().repeat_interleave(c // groups, 1) * weight  # [N, C]
    return scale, bias - mean.repeat_interleave(c // groups, 1) * scale


def norm_rows(x, groups, weight, bias, eps, silu):
    """Group normalisation of x [N, HW, C], and SiLU after it if asked: float32 or better inside, the result like x.

    weight and bias: [C], or [N, C]. One read for the sums and one read and write: made to be compiled.
    """
    rows = x.to(torch.promote_types(x.dtype, torch.float32))
    scale, shift = _scale_and_shift(rows, groups, weight, bias, eps)
    y = rows * scale[:, None] + shift[:, None]
    return (F.silu(y) if silu else y).to(x.dtype)


@functools.cache
def _compiled_norm(device="cuda"):
    """`norm_rows` compiled for tensors of any size, which takes seconds; None, and one line, where that fails."""
    try:
        torch._dynamo.config.recompile_limit = 64  # types, with and without gradients or SiLU: each its own kernels
        compiled = torch.compile(norm_rows, dynamic=True)
        with torch.enable_grad():  # the first to ask may be sampling
            x, weight = torch.ones(2, 16, 64, device=device, requires_grad=True), torch.ones(64, device=device)
            compiled(x, 16, weight, weight, 1e-5, True).sum().backward()
        return compiled
    except Exception as error:  # no compiler, an old card, a new driver: torch's own norm works on all
        why = str(error).strip().partition("\n")[0][:100]
        print(f"group norm is not compiled ({type(error).__name__}: {why}): slower", file=sys.stderr)
        return None


class GroupNorm(nn.GroupNorm):
    """Group normalisation that is fast for channels-last tensors, where torch's kernels are slow or copy to and fro.

    Statistics in float32 (or better) from sums over positions, then one multiply-add, in the input's dtype on a CPU.
    """

    def __init__(self, channels, eps=1e-6, groups=None):
        # EDM's own: at most 32 groups of at least 4 channels (a group of one channel would erase its mean).
        largest = max(1, min(32, channels // 4))
        super().__init__(groups or next(g for g in range(largest, 0, -1) if channels % g == 0), channels, eps)

    def forward(self, x, silu=False, adapt=None):
        """x [N, C, H, W], normalised; with adapt = (s, t), each [N, C], then y (1 + s) + t; with silu, then SiLU."""
        channels_last = x.is_contiguous(memory_format=torch.channels_last)
        if x.is_cuda and channels_last and (compiled := _compiled_norm()):
            return self._by_rows(compiled, x, silu, adapt)
        if channels_last and not x.is_cuda:
            rows = x.permute(0, 2, 3, 1).flatten(1, 2).to(torch.promote_types(x.dtype, torch.float32))  # [N, HW, C]
            scale, shift = _scale_and_shift(rows, self.num_groups, self.weight, self.bias, self.eps)
            y = torch.addcmul(shift[:, :, None, None].to(x.dtype), x, scale[:, :, None, None].to(x.dtype))
        else:
            y = super().forward(x)
        if adapt:
            scale, shift = (part[:, :, None, None].to(y.dtype) for part in adapt)
            y = torch.addcmul(shift, y, 1 + scale)
        return F.silu(y) if silu else y

    def _by_rows(self, norm, x, silu, adapt):
        weight, bias = self.weight.view(-1), self.bias.view(-1)  # of parameters the compiler would fix the sizes
        with torch.autocast(x.device.type, enabled=False):
            if adapt:
                scale, shift = (part.to(weight.dtype) for part in adapt)
                weight, bias = weight * (1 + scale), bias * (1 + scale) + shift
            rows = norm(x.permute(0, 2, 3, 1).flatten(1, 2), self.num_groups, weight, bias, self.eps, silu)
        return rows.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)


class UNetBlock(nn.Module):
    """Residual block: two convolutions, the noise embedding added between them, single-head attention at will.

    Both sums are scaled by 1/sqrt(2), which keeps the variance (Song et al. 2021, appendix H).
    """

    def __init__(self, fan_in, fan_out, emb, up=False, down=False, attention=False, dropout=0.0):
        super().__init__()
        self.in_channels, self.dropout = fan_in, dropout
        self.norm0 = GroupNorm(fan_in)
        self.conv0 = Conv2d(fan_in, fan_out, 3, up, down)
        self.affine = Linear(emb, fan_out)
        self.norm1 = GroupNorm(fan_out)
        self.conv1 = Conv2d(fan_out, fan_out, 3, gain=1e-5)
        self.skip = Conv2d(fan_in, fan_out, 1, up, down) if fan_in != fan_out or up or down else None
        self.attention = attention
        if attention:
            self.norm2 = GroupNorm(fan_out)
            self.qkv = Conv2d(fan_out, 3 * fan_out, 1, gain=math.sqrt(0.2))
            self.proj = Conv2d(fan_out, fan_out, 1, gain=1e-5)

    def forward(self, x, emb):
        h = self.conv0(self.norm0(x, silu=True))
        h = self.norm1(h + self.affine(emb)[:, :, None, None], silu=True)
        h = self.conv1(F.dropout(h, self.dropout, self.training))
        x = (h + (x if self.skip is None else self.skip(x))) * math.sqrt(0.5)
        if self.attention:
            n, c, height, width = x.shape
            qkv = self.qkv(self.norm2(x)).reshape(n, c, 3, height * width)  # published layout: channel-major
            q, k, v = qkv.permute(2, 0, 3, 1).unbind(0)  # each [N, HW, C]
            if x.is_cuda:  # whose fused kernels ask for heads, and for channels that lie together
                q, k, v = (part.unsqueeze(1).contiguous() for part in (q, k, v))
            a = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).reshape(x.shape)
            x = (x + self.proj(a)) * math.sqrt(0.5)
        return x


def positional_embedding(label, channels):
    """Sines and cosines of noise labels [N] at `channels / 2` frequencies from 1 to 1/10000: [N, channels]."""
    steps = torch.arange(channels // 2, dtype=label.dtype, device=label.device)
    angle = label[:, None] * 1e-4 ** (steps / (channels // 2 - 1))
    return torch.cat([angle.sin(), angle.cos()], dim=1)


class SongUNet(nn.Module):
    """DDPM++: encoder and decoder of residual blocks with skip connections, attention where asked.

    Input and output [N, channels, R, R]; `noise_label` is c_noise, [N]; class_labels one-hot [N, label_dim].
    """

    def __init__(self, img_resolution, channels, label_dim=0, augment_dim=0, model_channels=128,
                 channel_mult=(2, 2, 2), channel_mult_emb=4, num_blocks=4, attn_resolutions=(16,), dropout=0.0):
        super().__init__()
        shrink = 2 ** (len(channel_mult) - 1)
        require(img_resolution % shrink == 0,
                f"SongUNet: resolution {img_resolution} is not divisible by {shrink}, as its levels need")
        emb = channel_mult_emb * model_channels
        widths = [model_channels * m for m in channel_mult]
        levels = [(img_resolution >> level, width) for level, width in enumerate(widths)]
        self.map_label = Linear(label_dim, model_channels) if label_dim else None
        # Augmentation labels are zero when sampling; the layer is here because the published weights hold it.
        self.map_augment = Linear(augment_dim, model_channels, bias=False) if augment_dim else None
        self.map_layer0 = Linear(model_channels, emb)
        self.map_layer1 = Linear(emb, emb)

        def block(fan_in, fan_out, **options):
            return UNetBlock(fan_in, fan_out, emb, dropout=dropout, **options)

        self.enc = nn.ModuleDict()
        width, skips = model_channels, []
        for res, out in levels:
            if res == img_resolution:
                self.enc[f"{res}x{res}_conv"] = Conv2d(channels, width, 3)
            else:
                self.enc[f"{res}x{res}_down"] = block(width, width, down=True)
            skips.append(width)
            for idx in range(num_blocks):
                self.enc[f"{res}x{res}_block{idx}"] = block(width, out, attention=res in attn_resolutions)
                width = out
                skips.append(width)

        self.dec = nn.ModuleDict()
        for res, out in reversed(levels):
            if res == levels[-1][0]:
                self.dec[f"{res}x{res}_in0"] = block(width, width, attention=True)
                self.dec[f"{res}x{res}_in1"] = block(width, width)
            else:
                self.dec[f"{res}x{res}_up"] = block(width, width, up=True)
            for idx in range(num_blocks + 1):
                attention = idx == num_blocks and res in attn_resolutions
                self.dec[f"{res}x{res}_block{idx}"] = block(width + skips.pop(), out, attention=attention)
                width = out
        self.dec[f"{res}x{res}_aux_norm"] = GroupNorm(width)
        self.dec[f"{res}x{res}_aux_conv"] = Conv2d(width, channels, 3, gain=1e-5)

    def forward(self, x, noise_label, class_labels=None):
        emb = positional_embedding(noise_label, self.map_layer0.in_features)
        if self.map_label is not None:
            emb = emb + self.map_label(class_labels * math.sqrt(self.map_label.in_features))
        emb = F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))

        skips = []
        for block in self.enc.values():
            x = block(x, emb) if isinstance(block, UNetBlock) else block(x)
            skips.append(x)
        *blocks, norm, conv = self.dec.values()
        for block in blocks:
            x = block(x if x.shape[1] == block.in_channels else torch.cat([x, skips.pop()], dim=1), emb)
        return conv(norm(x, silu=True))


class Denoiser(nn.Module):
    """D(x; sigma), the minimiser of the denoising error, from which the score is (D(x) - x) / sigma^2.

    EDM eq. 7: D = c_skip x + c_out F(c_in x; c_noise). `patch_size` 2 runs F on the pixel-unshuffled image,
    a quarter of the positions with four times the channels, about twice as efficient on a CPU; 1 is published.
    sigma_min, sigma_max: the noise levels that the network supports, for the sampler.
    float32_levels: (from, to), noise levels where the sampler lets it compute in float32 though the rest be mixed; a
    small network needs that, where an image takes shape, for pixels that are right to a grey level.
    """

    def __init__(self, img_resolution, img_channels, label_dim=0, sigma_data=0.5, patch_size=1, sigma_min=0.0,
                 sigma_max=math.inf, float32_levels=(math.inf, 0.0), **unet):  # fmt: skip
        super().__init__()
        require(img_resolution % patch_size == 0,
                f"Denoiser: image size {img_resolution} is not divisible by patch_size {patch_size}")
        self.shape = (img_channels, img_resolution, img_resolution)
        self.sigma_min, self.sigma_max, self.float32_levels = sigma_min, sigma_max, tuple(float32_levels)
        self.label_dim, self.sigma_data, self.patch_size = label_dim, sigma_data, patch_size
        self.model = SongUNet(img_resolution // patch_size, img_channels * patch_size**2, label_dim, **unet)

    def forward(self, x, sigma, class_labels=None):
        """x [N, C, H, W]; sigma scalar or [N]; class_labels one-hot [N, label_dim]. Returns float32 like x."""
        require(tuple(x.shape[1:]) == self.shape, f"Denoiser: expected images [N, {self.shape}], got {tuple(x.shape)}")
        dtype = torch.float64 if self.model.map_layer0.weight.dtype == torch.float64 else torch.float32
        x = x.to(dtype)
        sigma = torch.as_tensor(sigma, dtype=dtype, device=x.device).reshape(-1, 1, 1, 1)
        if self.label_dim and class_labels is None:
            class_labels = torch.zeros(1, self.label_dim, dtype=dtype, device=x.device)
        variance = sigma**2 + self.sigma_data**2
        c_skip, c_in = self.sigma_data**2 / variance, variance.rsqrt()
        c_out = sigma * self.sigma_data * c_in
        c_noise = (sigma.log() / 4).flatten().expand(len(x))
        patches = F.pixel_unshuffle(c_in * x, self.patch_size)
        residual = F.pixel_shuffle(self.model(patches, c_noise, class_labels).to(dtype), self.patch_size)
        return c_skip * x + c_out * residual

    def round_sigma(self, sigma):
        """The supported noise level nearest to sigma: EDM's preconditioning knows all of them."""
        return sigma


def edm_loss(denoiser, images, log_sigma_normal, noise, p_mean=-1.2, p_std=1.2):
    """EDM training loss, table 1 and eq. 108: E lambda(sigma) ||D(y + n) - y||^2, mean over pixels. Scalar.

    images [N, C, H, W] in [-1, 1]; log_sigma_normal [N] and noise (like images) are standard normal draws.
    """
    sigma = (log_sigma_normal * p_std + p_mean).exp()
    weight = (sigma**2 + denoiser.sigma_data**2) / (sigma * denoiser.sigma_data) ** 2
    error = denoiser(images + noise * sigma[:, None, None, None], sigma) - images
    return (weight[:, None, None, None] * error**2).mean()
