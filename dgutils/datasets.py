"""Images as one uint8 array in one canonical order, whatever the source they came from.

Fashion-MNIST: `DGUTILS_DATA`/fashion-mnist, Debian's package dataset-fashion-mnist, or torchvision's download.
CIFAR-10: `DGUTILS_DATA`/cifar10/{train,test}.npz, the official cifar-10-batches-py or its tar in `DGUTILS_DATA` or its
cifar10, or torchvision's download. Verified by checksum.
"""

import functools
import gzip
import hashlib
import pickletools
import tarfile
from pathlib import Path

import numpy as np
import torch

from dgutils.errors import UserError, require
from dgutils.noise import keyed_rng
from dgutils.paths import cache_dir, data_dir

# sha256 of the canonical images and labels (see `_canonical`), measured once from two independent sources.
CHECKSUMS = {
    ("fashion_mnist", "train"): "fb5d0a725570ba10d59b1883c5f6883c2f9209c17326d54b9b7256193cf64c87",
    ("fashion_mnist", "test"): "b894c7acc782f3717958fa49b59fbaeef40982989e4c9455e600811dec83c774",
    ("cifar10", "train"): "d59acf989e068e709ce686cda292672c7b212c08d29d3d3e6d8c3aa99eba6a85",
    ("cifar10", "test"): "899683d46c3a8c66fd56e1af12202e69fe5a4517be10b0f68e04c78fe585c57c",
}
TEST_IMAGES = 10000  # of either dataset
_DEBIAN = Path("/usr/share/datasets/fashion-mnist")


def _read_idx(path: Path) -> np.ndarray:
    """An IDX file of unsigned bytes (LeCun's MNIST format): 4-byte magic, one 4-byte size per axis, data."""
    data = gzip.decompress(path.read_bytes())
    axes = data[3]
    return np.frombuffer(data, np.uint8, offset=4 + 4 * axes).reshape(np.frombuffer(data, ">i4", axes, offset=4))


def _from_torchvision(cls: str, split: str):
    import torchvision

    dataset = getattr(torchvision.datasets, cls)(cache_dir() / "data", train=split == "train", download=True)
    return np.asarray(dataset.data), np.asarray(dataset.targets)


def _fashion_mnist(split: str):
    stem = {"train": "train", "test": "t10k"}[split]
    for folder in (data_dir() and data_dir() / "fashion-mnist", _DEBIAN):
        if folder and folder.is_dir():
            images, labels = (_read_idx(folder / f"{stem}-{part}-ubyte.gz") for part in ("images-idx3", "labels-idx1"))
            break
    else:
        images, labels = _from_torchvision("FashionMNIST", split)
    return np.pad(images, ((0, 0), (2, 2), (2, 2)))[..., None], labels  # 28x28 in a black 32x32 frame


def _official_batch(data: bytes):
    """Images and labels of one of CIFAR-10's official pickles, from its opcodes: nothing of it is run.

    They hold the text "labels" with a list of small integers after it, and 3072 bytes an image, colour by colour.
    """
    images, labels, after = [], [], None
    for opcode, value, _ in pickletools.genops(data):
        if opcode.name in ("BINSTRING", "BINBYTES", "BINBYTES8") and len(value) % 3072 == 0:
            images.append(value if isinstance(value, bytes) else value.encode("latin-1"))
        elif isinstance(value, str | bytes):
            after = value
        elif opcode.name == "BININT1" and after in ("labels", b"labels"):
            labels.append(value)
    pixels = np.frombuffer(b"".join(images), np.uint8).reshape(-1, 3, 32, 32)
    return pixels.transpose(0, 2, 3, 1), np.array(labels)


def _official_cifar10(folder: Path, split: str):
    """From cifar-10-batches-py or its tar in a folder, which nothing is unpacked from; None if neither is there."""
    names = ["test_batch"] if split == "test" else [f"data_batch_{i}" for i in range(1, 6)]
    unpacked, packed = folder / "cifar-10-batches-py", folder / "cifar-10-python.tar.gz"
    if unpacked.is_dir():
        batches = [(unpacked / name).read_bytes() for name in names]
    elif packed.is_file():
        with tarfile.open(packed) as archive:
            batches = [archive.extractfile(f"{unpacked.name}/{name}").read() for name in names]
    else:
        return None
    images, labels = zip(*map(_official_batch, batches), strict=True)
    return np.concatenate(images), np.concatenate(labels)


def _cifar10(split: str):
    root = data_dir()
    path = root and root / "cifar10" / f"{split}.npz"
    if path and path.is_file():
        with np.load(path, allow_pickle=False) as data:
            require({"images", "labels"} <= set(data.files),
                    f"{path} holds {', '.join(data.files) or 'nothing'}; wanted are the arrays images "
                    "(uint8 [N, 32, 32, 3]) and labels (integers [N]), as numpy.savez names them")
            return data["images"], data["labels"]
    for folder in (root / "cifar10", root) if root else ():
        if found := _official_cifar10(folder, split):
            return found
    return _from_torchvision("CIFAR10", split)


_READERS = {"fashion_mnist": _fashion_mnist, "cifar10": _cifar10}
_REMEDIES = {
    "fashion_mnist": "install the Debian package dataset-fashion-mnist, or put the four IDX .gz files into "
    "$DGUTILS_DATA/fashion-mnist",
    "cifar10": "set DGUTILS_DATA to a folder with cifar-10-batches-py, cifar-10-python.tar.gz, or cifar10/train.npz "
    "and cifar10/test.npz (arrays images and labels), or go online once",
}


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
    expected = dataset_digest(name, split)
    try:
        images, labels, checksum = _canonical(*_READERS[name](split))
    except UserError:
        raise
    except Exception as error:  # torchvision, gzip and numpy raise a dozen types; all mean: not readable
        raise UserError(f"cannot read {name} ({split}): {error}; {_REMEDIES[name]}") from error
    require(checksum == expected,
            f"{name} ({split}) has checksum {checksum[:12]}, not the published images; {_REMEDIES[name]}")
    images.flags.writeable = labels.flags.writeable = False
    return images, labels


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
