"""Images as one uint8 array in one canonical order, whatever the source they came from, verified by checksum."""

import functools
import hashlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dgutils.errors import UserError, require
from dgutils.noise import keyed_rng
from dgutils.sources import SOURCES

# sha256 of the canonical images and labels (see `_canonical`), measured once from two independent sources.
CHECKSUMS = {
    ("fashion_mnist", "train"): "fb5d0a725570ba10d59b1883c5f6883c2f9209c17326d54b9b7256193cf64c87",
    ("fashion_mnist", "test"): "b894c7acc782f3717958fa49b59fbaeef40982989e4c9455e600811dec83c774",
    ("cifar10", "train"): "d59acf989e068e709ce686cda292672c7b212c08d29d3d3e6d8c3aa99eba6a85",
    ("cifar10", "test"): "899683d46c3a8c66fd56e1af12202e69fe5a4517be10b0f68e04c78fe585c57c",
}
TEST_IMAGES = 10000  # of either dataset


def _canonical(images: np.ndarray, labels: np.ndarray):
    """Sort by the digest of (label, pixels): an order that depends on the content alone, and looks random."""
    images, labels = np.ascontiguousarray(images, np.uint8), np.asarray(labels, np.int64)
    pairs = zip(images, labels.tolist(), strict=True)
    digests = [hashlib.sha256(bytes([label]) + image.tobytes()).digest() for image, label in pairs]
    order = sorted(range(len(images)), key=digests.__getitem__)
    return images[order], labels[order], hashlib.sha256(b"".join(digests[i] for i in order)).hexdigest()


@functools.cache
def load_dataset(name: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [N, 32, 32, C] and labels int64 [N] of `name` ("fashion_mnist", "cifar10"), read-only.

    Raises UserError for an unknown name or split, a source that is absent, or images with a wrong checksum.
    """
    expected, (read, remedy) = dataset_digest(name, split), SOURCES[name]
    try:
        images, labels, checksum = _canonical(*read(split))
    except Exception as error:  # torchvision, gzip and numpy raise a dozen types; all mean: not readable
        raise UserError(f"cannot read {name} ({split}): {error}; {remedy}") from error
    require(checksum == expected, f"{name} ({split}) has checksum {checksum[:12]}, not the published images; {remedy}")
    images.flags.writeable = labels.flags.writeable = False
    return images, labels


def read_folder(folder, channels: int) -> np.ndarray:
    """The PNG and JPEG files of a folder by name: uint8 [N, H, W, channels], 3 for colour or 1 for grey.

    Palettes, grey and colours are converted, of 16 bits the upper 8 kept. Raises UserError, naming the file, for what
    cannot be read or is transparent, and for a size that is not the first's.
    """
    found, images = sorted(Path(folder).expanduser().glob("[!.]*")), []
    for path in (path for path in found if path.suffix.lower() in (".png", ".jpg", ".jpeg")):
        try:
            image = Image.open(path)
            alpha = image.convert("RGBA").getextrema()[3]
        except Exception as error:  # Pillow's decoders raise a dozen types; all mean: not readable
            raise UserError(f"{path} cannot be read as an image ({error}): replace or remove it") from error
        require(alpha == (255, 255), f"{path} is transparent in places: save it on a background, without alpha")
        if image.mode.startswith("I"):
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        images.append(np.asarray(image.convert({1: "L", 3: "RGB"}[channels])).reshape(*image.size[::-1], channels))
        require(images[-1].shape == images[0].shape, f"{path} is not of the first image's size: give all the same")
    require(images, f"{folder} holds no .png, .jpg or .jpeg: name the folder in which they lie themselves")
    return np.stack(images)


def dataset_digest(name: str, split: str) -> str:
    """The checksum that `load_dataset` enforces: the identity of these images in the store."""
    require((name, split) in CHECKSUMS, f"no dataset '{name}' with split '{split}'; there are: {sorted(CHECKSUMS)}")
    return CHECKSUMS[name, split]


def split_indices(labels: np.ndarray, seed: int, held_out_every: int = 10) -> list[np.ndarray]:
    """Train, validation and test indices, stratified over `labels`, shuffled by `seed`; 10 gives 80/10/10.

    Label by label, each in shuffled order, the last two of every `held_out_every` images validate and test: sizes
    depend on the number of images alone, and classes stay in proportion. Raises UserError for held_out_every < 3.
    """
    require(held_out_every >= 3,
            f"held_out_every {held_out_every}: of at least 3 images, one trains, one validates, one tests")
    shuffled = [keyed_rng(seed, i).permutation(np.flatnonzero(labels == label))
                for i, label in enumerate(np.unique(labels))]
    order, place = np.concatenate(shuffled), np.arange(len(labels)) % held_out_every - held_out_every  # -k ... -1
    return [np.sort(order[part]) for part in (place < -2, place == -2, place == -1)]


def to_network(images: np.ndarray) -> torch.Tensor:
    """uint8 [N, H, W, C] to float32 [N, C, H, W] in [-1, 1]."""
    return torch.from_numpy(np.array(images.transpose(0, 3, 1, 2), order="C")).float() / 127.5 - 1


def to_uint8(x: torch.Tensor) -> np.ndarray:
    """[N, C, H, W] in [-1, 1] to uint8 [N, H, W, C], as EDM does it: 127.5 x + 128, clipped, truncated."""
    return (x * 127.5 + 128).clip(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()
