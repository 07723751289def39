"""The EDM denoiser: DDPM++ U-Net (Song et al. 2021) with EDM preconditioning (Karras et al. 2022, table 1).

One class at every scale: `CIFAR10_UNCOND_VP` below is the published CIFAR-10 network, the shipped small ones
are other arguments of it. Parameter names follow NVlabs' release, so that its weights load unchanged.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

from .errors import UserError

# NVIDIA's edm-cifar10-32x32-uncond-vp: 55.7 M parameters.
CIFAR10_UNCOND_VP = dict(
    img_resolution=32, img_channels=3, model_channels=128, channel_mult=(2, 2, 2), num_blocks=4,
    attn_resolutions=(16,), dropout=0.13, augment_dim=9,
)  # fmt: skip


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
    """Same-size convolution, optionally after doubling or halving the resolution with a box filter."""

    def __init__(self, fan_in, fan_out, kernel, up=False, down=False, gain=1.0):
        super().__init__()
        area = kernel * kernel
        self.weight = _xavier_uniform((fan_out, fan_in, kernel, kernel), fan_in * area, fan_out * area, gain)
        self.bias = nn.Parameter(torch.zeros(fan_out))
        self.up, self.down = up, down
        if up or down:  # the published files carry the [1, 1] filter; kept so that state dicts match
            self.register_buffer("resample_filter", torch.full((1, 1, 2, 2), 0.25))

    def forward(self, x):
        if self.up:
            x = F.interpolate(x, scale_factor=2, mode="nearest")
        if self.down:
            x = F.avg_pool2d(x, 2)
        return F.conv2d(x, self.weight, self.bias, padding=self.weight.shape[-1] // 2)


class GroupNorm(nn.GroupNorm):
    """Group normalisation that is fast for channels-last tensors, where torch's CPU kernel is 5-10x slower.

    Statistics in float32 (or better) from sums over positions, then one multiply-add in the input's dtype.
    """

    def __init__(self, channels, eps=1e-6):
        # At most 32 groups of at least 4 channels (a group of one channel would erase its mean); every
        # published width gets the published 32.
        largest = max(1, min(32, channels // 4))
        super().__init__(next(g for g in range(largest, 0, -1) if channels % g == 0), channels, eps)

    def forward(self, x):
        if not x.is_contiguous(memory_format=torch.channels_last) or x.is_cuda:
            return super().forward(x)
        n, c, height, width = x.shape
        g, size = self.num_groups, height * width * (c // self.num_groups)
        rows = x.permute(0, 2, 3, 1).reshape(n, height * width, c)
        rows = rows if rows.dtype == torch.float64 else rows.float()
        mean = rows.sum(1).view(n, g, -1).sum(2) / size  # [N, G]
        var = (rows * rows).sum(1).view(n, g, -1).sum(2) / size - mean**2
        scale = (var.clamp(min=0) + self.eps).rsqrt().repeat_interleave(c // g, 1) * self.weight  # [N, C]
        shift = self.bias - mean.repeat_interleave(c // g, 1) * scale
        return torch.addcmul(shift[:, :, None, None].to(x.dtype), x, scale[:, :, None, None].to(x.dtype))


class UNetBlock(nn.Module):
    """Residual block: two convolutions, the noise embedding added between them, single-head attention at will.

    Both sums are scaled by 1/sqrt(2), which keeps the variance (Song et al. 2021, appendix H).
    """

    def __init__(self, fan_in, fan_out, emb, up=False, down=False, attention=False, dropout=0.0):
        super().__init__()
        self.in_channels, self.out_channels, self.dropout = fan_in, fan_out, dropout
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
        h = self.conv0(F.silu(self.norm0(x)))
        h = F.silu(self.norm1(h + self.affine(emb)[:, :, None, None]))
        h = self.conv1(F.dropout(h, self.dropout, self.training))
        x = (h + (x if self.skip is None else self.skip(x))) * math.sqrt(0.5)
        if self.attention:
            n, c, height, width = x.shape
            qkv = self.qkv(self.norm2(x)).reshape(n, c, 3, height * width)  # published layout: channel-major
            q, k, v = qkv.permute(2, 0, 3, 1).unbind(0)  # each [N, HW, C]
            a = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
            x = (x + self.proj(a)) * math.sqrt(0.5)
        return x


class PositionalEmbedding(nn.Module):
    """Sines and cosines of the noise label at `channels / 2` frequencies from 1 to 1/10000."""

    def __init__(self, channels):
        super().__init__()
        self.channels = channels

    def forward(self, label):
        half = self.channels // 2
        exponent = torch.arange(half, dtype=label.dtype, device=label.device) / (half - 1)
        angle = label[:, None] * 1e-4**exponent
        return torch.cat([angle.sin(), angle.cos()], dim=1)


class SongUNet(nn.Module):
    """DDPM++: encoder and decoder of residual blocks with skip connections, attention where asked.

    Input and output [N, channels, R, R]; `noise_label` is c_noise, [N].
    """

    def __init__(self, img_resolution, channels, label_dim=0, augment_dim=0, model_channels=128,
                 channel_mult=(2, 2, 2), num_blocks=4, attn_resolutions=(16,), dropout=0.0):  # fmt: skip
        super().__init__()
        emb = 4 * model_channels
        widths = [model_channels * m for m in channel_mult]
        resolutions = [img_resolution >> level for level in range(len(widths))]
        self.map_noise = PositionalEmbedding(model_channels)
        self.map_label = Linear(label_dim, model_channels) if label_dim else None
        # Augmentation labels are zero when sampling; the layer is here because the published weights hold it.
        self.map_augment = Linear(augment_dim, model_channels, bias=False) if augment_dim else None
        self.map_layer0 = Linear(model_channels, emb)
        self.map_layer1 = Linear(emb, emb)

        self.enc = nn.ModuleDict()
        width, skips = model_channels, []
        for level, (res, out) in enumerate(zip(resolutions, widths, strict=True)):
            if level == 0:
                self.enc[f"{res}x{res}_conv"] = Conv2d(channels, width, 3)
            else:
                self.enc[f"{res}x{res}_down"] = UNetBlock(width, width, emb, down=True, dropout=dropout)
            skips.append(width)
            for idx in range(num_blocks):
                attention = res in attn_resolutions
                self.enc[f"{res}x{res}_block{idx}"] = UNetBlock(
                    width, out, emb, attention=attention, dropout=dropout
                )
                width = out
                skips.append(width)

        self.dec = nn.ModuleDict()
        for level in reversed(range(len(widths))):
            res, out = resolutions[level], widths[level]
            if level == len(widths) - 1:
                self.dec[f"{res}x{res}_in0"] = UNetBlock(width, width, emb, attention=True, dropout=dropout)
                self.dec[f"{res}x{res}_in1"] = UNetBlock(width, width, emb, dropout=dropout)
            else:
                self.dec[f"{res}x{res}_up"] = UNetBlock(width, width, emb, up=True, dropout=dropout)
            for idx in range(num_blocks + 1):
                attention = idx == num_blocks and res in attn_resolutions
                self.dec[f"{res}x{res}_block{idx}"] = UNetBlock(
                    width + skips.pop(), out, emb, attention=attention, dropout=dropout
                )
                width = out
        self.dec[f"{img_resolution}x{img_resolution}_aux_norm"] = GroupNorm(width)
        self.dec[f"{img_resolution}x{img_resolution}_aux_conv"] = Conv2d(width, channels, 3, gain=1e-5)

    def forward(self, x, noise_label, class_labels=None):
        emb = self.map_noise(noise_label)
        if self.map_label is not None:
            emb = emb + self.map_label(class_labels * math.sqrt(self.map_label.in_features))
        emb = F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))

        skips = []
        for block in self.enc.values():
            x = block(x, emb) if isinstance(block, UNetBlock) else block(x)
            skips.append(x)
        *blocks, norm, conv = self.dec.values()
        for block in blocks:
            if x.shape[1] != block.in_channels:
                x = torch.cat([x, skips.pop()], dim=1)
            x = block(x, emb)
        return conv(F.silu(norm(x)))


class Denoiser(nn.Module):
    """D(x; sigma), the minimiser of the denoising error, from which the score is (D(x) - x) / sigma^2.

    EDM eq. 7: D = c_skip x + c_out F(c_in x; c_noise). `patch_size` 2 runs F on the pixel-unshuffled image,
    a quarter of the positions with four times the channels, about twice as efficient on a CPU; 1 is published.
    """

    def __init__(self, img_resolution, img_channels, label_dim=0, sigma_data=0.5, patch_size=1, **unet):
        super().__init__()
        if img_resolution % patch_size:
            raise UserError(f"Denoiser: image size {img_resolution} is not divisible by patch_size {patch_size}")
        self.shape = (img_channels, img_resolution, img_resolution)
        self.label_dim, self.sigma_data, self.patch_size = label_dim, sigma_data, patch_size
        self.model = SongUNet(img_resolution // patch_size, img_channels * patch_size**2, label_dim, **unet)

    def forward(self, x, sigma, class_labels=None):
        """x [N, C, H, W]; sigma scalar or [N]; class_labels one-hot [N, label_dim]. Returns float32 like x."""
        if x.ndim != 4 or tuple(x.shape[1:]) != self.shape:
            raise UserError(f"Denoiser: expected images [N, {self.shape}], got {tuple(x.shape)}")
        dtype = torch.float64 if self.model.map_layer0.weight.dtype == torch.float64 else torch.float32
        x = x.to(dtype)
        sigma = torch.as_tensor(sigma, dtype=dtype, device=x.device).reshape(-1, 1, 1, 1)
        if self.label_dim and class_labels is None:
            class_labels = torch.zeros(1, self.label_dim, dtype=dtype, device=x.device)
        variance = sigma**2 + self.sigma_data**2
        c_skip = self.sigma_data**2 / variance
        c_out = sigma * self.sigma_data * variance.rsqrt()
        c_in = variance.rsqrt()
        c_noise = (sigma.log() / 4).flatten().expand(len(x))
        patches = F.pixel_unshuffle(c_in * x, self.patch_size)
        residual = F.pixel_shuffle(self.model(patches, c_noise, class_labels).to(dtype), self.patch_size)
        return c_skip * x + c_out * residual


def edm_loss(denoiser, images, log_sigma_normal, noise, p_mean=-1.2, p_std=1.2):
    """EDM training loss, table 1 and eq. 108: E lambda(sigma) ||D(y + n) - y||^2, mean over pixels. Scalar.

    images [N, C, H, W] in [-1, 1]; log_sigma_normal [N] and noise (like images) are standard normal draws.
    """
    sigma = (log_sigma_normal * p_std + p_mean).exp()
    weight = (sigma**2 + denoiser.sigma_data**2) / (sigma * denoiser.sigma_data) ** 2
    error = denoiser(images + noise * sigma[:, None, None, None], sigma) - images
    return (weight[:, None, None, None] * error**2).mean()
