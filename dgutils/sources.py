"""Other people's files of images and labels, as their readers find them: unordered, unchecked.

Fashion-MNIST: `DGUTILS_DATA`/fashion-mnist, Debian's package dataset-fashion-mnist, or torchvision's download.
CIFAR-10: `DGUTILS_DATA`/cifar10/{train,test}.npz, the official `DGUTILS_DATA`/cifar-10-batches-py, or torchvision's
download.
"""

import gzip
from contextlib import suppress
from pathlib import Path

import numpy as np

from dgutils.errors import UserError, require
from dgutils.paths import cache_dir, data_dir

DEBIAN, BATCHES = Path("/usr/share/datasets/fashion-mnist"), "cifar-10-batches-py"  # of CIFAR-10


def places(dataset: str) -> list[Path]:
    """The files and folders in which a data set may lie, whether they exist or not."""
    fashion = dataset == "fashion_mnist"
    own = ("fashion-mnist",) if fashion else ("cifar10", BATCHES)
    found = [data_dir() / name for name in own if data_dir()] + [DEBIAN] * fashion
    with suppress(UserError):  # no home, and none is needed for the others
        found.append(cache_dir() / "data" / ("FashionMNIST/raw" if fashion else BATCHES))
    return found


def _read_idx(path: Path) -> np.ndarray:
    """An IDX file of unsigned bytes (LeCun's MNIST format): 4-byte magic, one 4-byte size per axis, data."""
    data = gzip.decompress(path.read_bytes())
    axes = data[3]
    return np.frombuffer(data, np.uint8, offset=4 + 4 * axes).reshape(np.frombuffer(data, ">i4", axes, offset=4))


def _from_torchvision(cls: str, split: str):
    import torchvision

    own = cls == "CIFAR10" and data_dir() and (data_dir() / BATCHES).is_dir()  # whose checksums it compares first
    root = data_dir() if own else cache_dir() / "data"
    dataset = getattr(torchvision.datasets, cls)(root, train=split == "train", download=not own)
    return np.asarray(dataset.data), np.asarray(dataset.targets)


def _fashion_mnist(split: str):
    stem = {"train": "train", "test": "t10k"}[split]
    own = data_dir() / "fashion-mnist" if data_dir() else DEBIAN
    if folder := next((folder for folder in (own, DEBIAN) if folder.is_dir()), None):
        images, labels = (_read_idx(folder / f"{stem}-{part}-ubyte.gz") for part in ("images-idx3", "labels-idx1"))
    else:
        images, labels = _from_torchvision("FashionMNIST", split)
    return np.pad(images, ((0, 0), (2, 2), (2, 2)))[..., None], labels  # 28x28 in a black 32x32 frame


def _cifar10(split: str):
    path = data_dir() and data_dir() / "cifar10" / f"{split}.npz"
    if path and path.is_file():
        with np.load(path, allow_pickle=False) as data:
            require({"images", "labels"} <= set(data.files),
                    f"{path} holds {', '.join(data.files) or 'nothing'}; wanted are the arrays images "
                    "(uint8 [N, 32, 32, 3]) and labels (integers [N]), as numpy.savez names them")
            return data["images"], data["labels"]
    return _from_torchvision("CIFAR10", split)


# What reads a dataset, and what to do if it cannot be read.
SOURCES = {
    "fashion_mnist": (_fashion_mnist, "install the Debian package dataset-fashion-mnist, or put the four IDX .gz files "
                      "into $DGUTILS_DATA/fashion-mnist"),
    "cifar10": (_cifar10, "set DGUTILS_DATA to a folder with cifar-10-batches-py, or with cifar10/train.npz and "
                "cifar10/test.npz (arrays images and labels), or go online once"),
}
