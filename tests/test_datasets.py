"""The images: one order whatever the source, verified, split in proportion."""

import gzip
import pathlib
import pickle

import numpy as np
import pytest
import torch

from dgutils import datasets, sources
from dgutils.errors import UserError


def test_canonical_order_forgets_the_source():
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (50, 4, 4, 1), np.uint8), rng.integers(0, 3, 50)
    shuffled = rng.permutation(50)
    first = datasets._canonical(images, labels)
    second = datasets._canonical(images[shuffled], labels[shuffled])
    assert all(np.array_equal(a, b) for a, b in zip(first[:2], second[:2], strict=True)) and first[2] == second[2]
    altered = images.copy()
    altered[7, 0, 0, 0] ^= 1
    assert datasets._canonical(altered, labels)[2] != first[2]


@pytest.fixture(scope="module")
def fashion():
    return datasets.load_dataset("fashion_mnist", "test")


def test_fashion_mnist_is_the_published_one(fashion):
    images, labels = fashion  # load_dataset has checked the checksum of every pixel and label
    assert images.shape == (10000, 32, 32, 1) and images.dtype == np.uint8
    assert np.bincount(labels).tolist() == [1000] * 10
    assert images[:, [0, 1, 30, 31]].max() == 0 and images[:, :, [0, 1, 30, 31]].max() == 0  # the black frame
    assert images[:, 2:30, 2:30].max() == 255 and not images.flags.writeable


def test_the_first_thousand_hold_all_classes(fashion):
    """The order is by content digest, so a prefix is a fair sample (CIFAR-10's own files are sorted by class)."""
    counts = np.bincount(fashion[1][:1000], minlength=10)
    assert counts.min() > 60 and counts.max() < 140


def test_splits_are_disjoint_complete_stratified_and_seeded():
    labels = np.repeat(np.arange(5), [100, 200, 50, 350, 300])
    parts = datasets.split_indices(labels, 0)
    assert [len(p) for p in parts] == [800, 100, 100]
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(1000))
    for part, share in zip(parts, (0.8, 0.1, 0.1), strict=True):
        assert np.abs(np.bincount(labels[part], minlength=5) - share * np.bincount(labels)).max() <= 1
    assert not np.array_equal(parts[1], datasets.split_indices(labels, 1)[1])
    assert np.array_equal(parts[1], datasets.split_indices(labels, 0)[1])


def test_uint8_round_trip():
    images = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    x = datasets.to_network(images)
    assert x.min() == -1 and x.max() == 1 and x.shape == (1, 1, 16, 16)
    assert np.array_equal(datasets.to_uint8(x), images)
    assert datasets.to_uint8(torch.full((1, 1, 1, 1), 9.0)).item() == 255  # clipped


def test_unknown_names_are_one_line():
    for name, split in (("mnist", "train"), ("cifar10", "validation")):
        with pytest.raises(UserError, match="there are"):
            datasets.load_dataset(name, split)


def test_damaged_and_absent_sources_say_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("DGUTILS_DATA", str(tmp_path))
    folder = tmp_path / "fashion-mnist"
    folder.mkdir()
    load = datasets.load_dataset.__wrapped__  # without its cache
    with pytest.raises(UserError, match="dataset-fashion-mnist"):
        load("fashion_mnist", "test")
    header = bytes([0, 0, 8, 3]) + np.array([2, 28, 28], ">i4").tobytes()
    with gzip.open(folder / "t10k-images-idx3-ubyte.gz", "wb") as file:
        file.write(header + bytes(2 * 784))
    with gzip.open(folder / "t10k-labels-idx1-ubyte.gz", "wb") as file:
        file.write(bytes([0, 0, 8, 1]) + np.array([2], ">i4").tobytes() + bytes(2))
    with pytest.raises(UserError, match="not the published images"):
        load("fashion_mnist", "test")
    (folder / "t10k-images-idx3-ubyte.gz").write_bytes(b"\x1f\x8b broken")
    with pytest.raises(UserError, match="cannot read"):
        load("fashion_mnist", "test")


def test_failed_download_is_one_line_that_begins_with_what_failed(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("Error downloading a.gz:\n  Tried one mirror:\n  <urlopen error>\n")

    monkeypatch.setenv("DGUTILS_DATA", str(tmp_path))
    monkeypatch.setattr(sources, "_from_torchvision", fail)
    with pytest.raises(UserError) as caught:
        datasets.load_dataset.__wrapped__("cifar10", "test")
    assert str(caught.value).startswith("cannot read cifar10 (test): Error downloading a.gz: Tried one mirror: <url")
    assert "\n" not in str(caught.value) and "set DGUTILS_DATA" in str(caught.value)


class Hostile:
    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path("touched"),)


def test_cifar10s_official_batches_count_by_their_checksums_alone(tmp_path, monkeypatch):
    """Of others in their place nothing is run, and nothing is downloaded over them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DGUTILS_DATA", str(tmp_path))
    datasets.load_dataset.cache_clear()
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in ("test_batch", "batches.meta", *(f"data_batch_{i}" for i in range(1, 6))):
        (folder / name).write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(UserError, match="set DGUTILS_DATA to a folder with cifar-10-batches-py"):
        datasets.load_dataset("cifar10", "test")
    assert sorted(path.name for path in tmp_path.iterdir()) == [folder.name]
    monkeypatch.setattr("torchvision.datasets.CIFAR10._check_integrity", lambda self: True)
    (folder / "test_batch").write_bytes(pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [3, 4]}))
    monkeypatch.setattr("torchvision.datasets.CIFAR10._load_meta", lambda self: None)
    images, labels = sources.SOURCES["cifar10"][0]("test")
    assert images.shape == (2, 32, 32, 3) and labels.tolist() == [3, 4]


@pytest.mark.parametrize("arrays", [("arr_0", "arr_1"), ("data", "labels"), ("images",), ()])
def test_arrays_of_other_names_are_answered_with_those_that_are_wanted(tmp_path, monkeypatch, arrays):
    monkeypatch.setenv("DGUTILS_DATA", str(tmp_path))
    datasets.load_dataset.cache_clear()
    (tmp_path / "cifar10").mkdir()
    np.savez(tmp_path / "cifar10" / "test.npz", **{name: np.zeros(3) for name in arrays})
    held = ", ".join(arrays) or "nothing"
    with pytest.raises(UserError, match=f"test.npz holds {held}; wanted are the arrays images"):
        datasets.load_dataset("cifar10", "test")
