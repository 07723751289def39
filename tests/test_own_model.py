"""A model and images of one's own: a DDPM network as a denoiser, a folder of pictures, and the page that uses both."""

import re
import struct
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from dgutils.datasets import read_folder, split_indices
from dgutils.errors import UserError
from dgutils.noise import PerSampleNoise, vp_scale
from dgutils.sampler import EpsilonDenoiser, edm_sampler, fitted_sigmas

PAGE = (Path(__file__).resolve().parents[1] / "docs/own_model.md").read_text(encoding="utf-8")
ALPHAS_BAR = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)  # DDPM's, float32 as diffusers has them
PIXELS = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
GREY = PIXELS[..., 0]


def exact(mean, spread, wrap=lambda eps: eps):
    """The best noise prediction for data of independent normal pixels, mean [C, 1, 1]."""

    def network(x, t):
        assert x.dtype == torch.float32 and t.dtype == torch.int64
        alpha = ALPHAS_BAR.double()[t][:, None, None, None]
        share = (1 - alpha).sqrt() / (alpha * spread**2 + 1 - alpha)
        return wrap((share * (x.double() - alpha.sqrt() * mean)).float())

    return network


# --- the denoiser

MEAN = torch.tensor([0.3, -0.5, 0.1], dtype=torch.float64)[:, None, None]
WRAPS = {
    "a tensor": lambda eps: eps,
    "diffusers' output": lambda eps: SimpleNamespace(sample=eps),
    "with variances": lambda eps: torch.cat([eps, torch.full_like(eps, 9)], 1),
}


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_a_noise_prediction_is_a_denoiser(wrap):
    denoise = EpsilonDenoiser(exact(MEAN, 0.4, wrap), ALPHAS_BAR)
    sigma = denoise.levels[torch.tensor([0, 300, 700, 999])]
    x = MEAN + (0.16 + sigma**2).sqrt()[:, None, None, None] * torch.randn(4, 3, 8, 8, dtype=torch.float64)
    weight = (0.16 / (0.16 + sigma**2))[:, None, None, None]
    denoised = denoise(x, sigma, 0, 1)
    assert denoised.dtype == torch.float64
    torch.testing.assert_close(denoised, weight * x + (1 - weight) * MEAN, atol=2e-3, rtol=0)  # float32's rounding
    torch.testing.assert_close(vp_scale(denoise.levels), ALPHAS_BAR.double().sqrt())


def test_it_draws_the_distribution_of_its_data():
    denoise = EpsilonDenoiser(exact(MEAN, 0.4), ALPHAS_BAR)
    sigmas = fitted_sigmas(denoise, 60, 0.002, 80.0, 7.0)
    assert set(sigmas[:-1].tolist()) <= set(denoise.levels.tolist()) and sigmas[-1] == 0
    images = edm_sampler(denoise, PerSampleNoise(range(64), (3, 8, 8)), sigmas)
    spread, mean = torch.std_mean(images, (0, 2, 3))
    assert (spread - 0.4).abs().max() < 0.02 and (mean - MEAN.flatten()).abs().max() < 0.02


NONE = {"rising": ALPHAS_BAR.flip(0), "ones": torch.ones(10), "to zero": torch.linspace(0.9, 0, 10),
        "NaN": torch.tensor([0.5, float("nan")]), "a number": torch.tensor(0.5), "rows": ALPHAS_BAR[None]}  # fmt: skip


@pytest.mark.parametrize("alphas", NONE.values(), ids=NONE)
def test_what_are_no_alphas_is_one_line(alphas):
    with pytest.raises(UserError, match="alphas_bar must fall from below 1 to above 0"):
        EpsilonDenoiser(exact(MEAN, 0.4), alphas)


# --- the folder


def png_of_16_bits(path, pixels):
    """A PNG of 16 bits a channel, colour or grey, which Pillow does not write in colour."""
    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, 2 if pixels.ndim == 3 else 0, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts))  # fmt: skip


def saved(image, **options):
    return lambda path: image.save(path, **options)


def rgba(alpha):
    return Image.fromarray(np.dstack([PIXELS, np.full((16, 16), alpha, np.uint8)]))


ON_GREY = np.repeat(GREY[..., None], 3, 2)
PALETTE = Image.fromarray(PIXELS).quantize(256)
KINDS = {
    "colour": (saved(Image.fromarray(PIXELS)), PIXELS), "grey": (saved(Image.fromarray(GREY)), ON_GREY),
    "palette": (saved(PALETTE), np.asarray(PALETTE.convert("RGB"))),
    "one bit": (saved(Image.fromarray(GREY > 127)), 255 * (ON_GREY > 127).astype(np.uint8)),
    "16 bit grey": (lambda path: png_of_16_bits(path, GREY * np.uint16(256) + np.uint16(200)), ON_GREY),
    "16 bit colour": (lambda path: png_of_16_bits(path, PIXELS * np.uint16(256) + np.uint16(100)), PIXELS),
    "opaque alpha": (saved(rgba(255)), PIXELS),
    "opaque grey alpha": (saved(Image.fromarray(np.dstack([GREY, np.full_like(GREY, 255)]), "LA")), ON_GREY),
}  # fmt: skip


@pytest.mark.parametrize(("write", "expected"), KINDS.values(), ids=KINDS)
def test_whatever_a_png_holds_is_converted(tmp_path, write, expected):
    write(tmp_path / "a.png")
    images = read_folder(tmp_path, channels=3)
    assert images.shape == (1, 16, 16, 3) and images.dtype == np.uint8 and (images[0] == expected).all()
    grey = read_folder(str(tmp_path), channels=1)
    assert grey.shape == (1, 16, 16, 1) and np.abs(grey[0, ..., 0] - expected @ [0.299, 0.587, 0.114]).max() < 1


def test_files_are_taken_by_name_and_others_left_alone(tmp_path):
    for number, name in enumerate(["b.png", "a.PNG", "c.jpg", "d.jpeg", ".hidden.png", "notes.txt", "e.bmp"]):
        form = None if name[0] in "cde" else "png"
        Image.new("L", (4, 4), 40 * number).save(tmp_path / name, form)
    (tmp_path / "below").mkdir()
    assert read_folder(tmp_path, 1)[:, 0, 0, 0].tolist() == [40, 0, 80, 120]


def changed(change):
    return lambda path: path.write_bytes(change(path.with_name("a.png").read_bytes()))


BROKEN = {
    "cut short": (changed(lambda data: data[:300]), "b.png cannot be read as an image"),
    "a web page": (lambda path: path.write_text("<html>"), "b.png cannot be read as an image .*: replace or remove it"),
    "empty": (lambda path: path.touch(), "b.png cannot be read"),
    "a wrong checksum": (changed(lambda data: data.replace(b"IDAT", b"IDAT\0", 1)), "b.png cannot"),
    "a folder": (lambda path: path.mkdir(), "b.png cannot be read"),
    "another size": (saved(Image.new("RGB", (16, 17))), "b.png is not of the first image's size: give all the same"),
    "turned": (saved(Image.new("RGB", (8, 32))), "b.png is not of the first image's size"),
    "transparent": (saved(rgba(254)), "b.png is transparent in places: save it on a background"),
    "a transparent palette": (saved(PALETTE, transparency=int(np.asarray(PALETTE)[0, 0])), "b.png is transparent"),
}  # fmt: skip


@pytest.mark.parametrize(("write", "message"), BROKEN.values(), ids=BROKEN)
def test_what_cannot_be_used_is_named(tmp_path, write, message):
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    write(tmp_path / "b.png")
    with pytest.raises(UserError, match=message) as error:
        read_folder(tmp_path, 3)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["", "absent", "file.png"])
def test_no_images_is_one_line(tmp_path, name):
    (tmp_path / "file.png").touch() if name == "file.png" else None
    with pytest.raises(UserError, match="holds no .png, .jpg or .jpeg"):
        read_folder(tmp_path / name, 3)


# --- the page


def test_the_pages_blocks_run_in_their_order(tmp_path, monkeypatch, capsys):
    """Data of two spread levels and a network that knows only one: guidance has something to correct."""
    monkeypatch.chdir(tmp_path)
    Path("real").mkdir()
    rng = np.random.default_rng(1)
    for number in range(43):
        pixels = (127.5 + 127.5 * (MEAN.numpy().T + 0.2 * rng.standard_normal((32, 32, 3)))).clip(0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(f"real/{number}.png")
    space = {"network": exact(MEAN, 0.4), "alphas_cumprod": ALPHAS_BAR, "num_steps": 3, "epochs": 2,
             "my_denoiser": lambda x, sigma: x / (1 + sigma[:, None, None, None] ** 2)}  # fmt: skip
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
    for place, block in enumerate(blocks, 1):
        exec(compile(block, f"docs/own_model.md, block {place}", "exec"), space)
    assert space["real"].shape == space["guided"].shape == (43, 32, 32, 3)
    assert not np.array_equal(space["guided"], space["unguided"]) and len(space["mine"].history) == 2
    assert [len(part.images) for part in (space["learn"], space["test"])] == [
        2 * len(indices) for indices in split_indices(np.zeros(43), 0)[::2]]
    number = r"-?\d+\.\d\d"
    said = rf"KID x 1000: {number}, guided {number}; change {number} \[{number}, {number}\]\n"
    assert re.fullmatch(said, capsys.readouterr().out)
    assert np.array_equal(read_folder("guided", 3), space["guided"])  # as clean-fid and torch-fidelity will find them
    x, sigma = torch.ones(2, 3, 4, 4, dtype=torch.float64), torch.tensor([1.0, 3.0], dtype=torch.float64)
    assert space["denoise_by_hand"](x, sigma, 0, 1)[:, 0, 0, 0].tolist() == [0.5, pytest.approx(0.1)]
    assert sum(bool(line.strip()) and not line.startswith(("from", "import")) for line in blocks[2].splitlines()) <= 25
