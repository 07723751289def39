"""A network trained on by the clock, wherever a GPU is to be had for some minutes; needs no more than torch and images.

    python tests/gpu_network.py --minutes 7 --out DIR [--name NAME]

Without a name it trains cifar10-edm-gpu2, which goes on from cifar10-edm-gpu; a recipe (dgutils/assets/NAME.yaml) says
where it starts, and a network that is shipped unfinished goes on from itself. DIR gets the weights in parts of 15 MiB,
their card with the loss curve and, where the test images are at hand, the held-out loss, and for a score network a grid
of samples. Parts and card are written every minute, so that whatever ends it early leaves a network;
`python -m dgutils train-score NAME --join DIR` joins them.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import torch
from PIL import Image

from dgutils import datasets
from dgutils.networks import checkpoints, pretrain
from dgutils.networks.edm import Denoiser
from dgutils.noise import PerSampleNoise, karras_sigmas
from dgutils.sampler import edm_sampler, network_denoiser

NAME = "cifar10-edm-gpu2"


def grid(network, device: torch.device, steps: int, side: int) -> Image.Image:
    """side x side unguided images of seeds 0, 1, ...: 18 steps of Heun's method make EDM's 35 evaluations."""
    noise = PerSampleNoise(range(side * side), network.shape, device)
    images = datasets.to_uint8(edm_sampler(network_denoiser(network), noise, karras_sigmas(steps)))
    height, width, channels = images.shape[1:]
    rows = images.reshape(side, side, height, width, channels).swapaxes(1, 2)
    return Image.fromarray(rows.reshape(side * height, side * width, channels).squeeze())


def run(name: str, minutes: float, out: Path, device: torch.device, steps: int = 18, side: int = 16,
        save_minutes: float = 1.0) -> dict:  # fmt: skip
    """Train, and write to `out` what is worth bringing home; returns the card."""
    out.mkdir(parents=True, exist_ok=True)

    def hand_over(weights: Path) -> None:
        pretrain.write_parts(weights, out)
        shutil.copyfile(weights.with_suffix(".json"), out / f"{name}.json")

    with tempfile.TemporaryDirectory() as folder:
        weights = pretrain.train_network(name, Path(folder), save_minutes=save_minutes, minutes=minutes,
                                         device=device, saved=hand_over)  # fmt: skip
        card, tensors = json.loads(weights.with_suffix(".json").read_text()), checkpoints.read_tensors(weights)[0]
    seen = card["images_seen"] - card["optimizer_restarted_at_images"]
    print(f"{name}: {seen:,} images in {minutes} minutes on {card['device']}: {seen / (60 * minutes):,.0f} a second")
    print("training loss:", *(f"{row['loss']:.5f}" for row in card["loss_curve"][-5:]), "held out:", card["evaluation"])
    if card["recipe"]["architecture"] == "Denoiser":
        network = Denoiser(**card["recipe"]["config"]).to(device).eval().requires_grad_(False)
        network.load_state_dict({key: value.float() for key, value in tensors.items()})
        grid(network, device, steps, side).save(out / f"{name}.png")
    return card


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default=NAME)
    parser.add_argument("--minutes", type=float, default=7)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", type=torch.device, default=pretrain.default_device())
    args = parser.parse_args()
    run(args.name, args.minutes, args.out, args.device)
