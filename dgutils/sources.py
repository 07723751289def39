"""Other people's files of images and labels, as their readers find them: unordered, unchecked.

Fashion-MNIST: `DGUTILS_DATA`/fashion-mnist, Debian's package dataset-fashion-mnist, or torchvision's download.
CIFAR-10: `DGUTILS_DATA`/cifar10/{train,test}.npz, the official cifar-10-batches-py or its tar in `DGUTILS_DATA` or its
cifar10, or torchvision's download.
"""

import gzip
import pickletools
import tarfile
from contextlib import suppress
from pathlib import Path

import numpy as np

from dgutils.errors import UserError, require
from dgutils.paths import cache_dir, data_dir

DEBIAN = Path("/usr/share/datasets/fashion-mnist")


def places(dataset: str) -> list[Path]:
    """The files and folders in which a data set may lie, whether they exist or not."""
    fashion = dataset == "fashion_mnist"
    own = ("fashion-mnist",) if fashion else ("cifar10", "cifar-10-batches-py", "cifar-10-python.tar.gz")
    found = [data_dir() / name for name in own if data_dir()] + [DEBIAN] * fashion
    with suppress(UserError):  # no home, and none is needed for the others
        found.append(cache_dir() / "data" / ("FashionMNIST/raw" if fashion else "cifar-10-batches-py"))
    return found


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
    own = data_dir() / "fashion-mnist" if data_dir() else DEBIAN
    if folder := next((folder for folder in (own, DEBIAN) if folder.is_dir()), None):
        images, labels = (_read_idx(folder / f"{stem}-{part}-ubyte.gz") for part in ("images-idx3", "labels-idx1"))
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
    return np.frombuffer(b"".join(images), np.uint8).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), np.array(labels)


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


# What reads a dataset, and what to do if it cannot be read.
SOURCES = {
    "fashion_mnist": (_fashion_mnist, "install the Debian package dataset-fashion-mnist, or put the four IDX .gz files "
                      "into $DGUTILS_DATA/fashion-mnist"),
    "cifar10": (_cifar10, "set DGUTILS_DATA to a folder with cifar-10-batches-py, cifar-10-python.tar.gz, or "
                "cifar10/train.npz and cifar10/test.npz (arrays images and labels), or go online once"),
}
