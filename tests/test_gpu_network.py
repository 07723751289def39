"""The piece that trains a network on a GPU, on a CPU: it brings home what it should, wherever it is cut off."""

import json
import random

import numpy as np
import pytest
import torch
from gpu_network import NAME, run
from PIL import Image
from test_pretrain import RECIPE, assets, rates  # noqa: F401

from dgutils import datasets
from dgutils.networks import checkpoints, pretrain

CPU = torch.device("cpu")


def test_brings_home_weights_card_and_images(assets, tmp_path, rates):  # noqa: F811
    card = run("toy", 0.5, tmp_path / "out", CPU, steps=2, side=3)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"toy.safetensors.part0", "toy.json", "toy.png"}
    assert Image.open(tmp_path / "out" / "toy.png").size == (96, 96)
    joined = pretrain.join("toy", tmp_path / "out", tmp_path / "home")
    assert checkpoints.sha256_of(joined) == card["sha256"] and card["finished"] and card["loss_curve"]


def test_cut_off_at_a_random_moment_it_leaves_a_network(assets, tmp_path, monkeypatch, rates):  # noqa: F811
    moment, real, calls = random.randrange(2, 40), pretrain.edm.edm_loss, []
    print("cut off at step", moment)

    def cut_off(*args):
        calls.append(1)
        if len(calls) == moment:
            raise SystemExit
        return real(*args)

    monkeypatch.setattr(pretrain.edm, "edm_loss", cut_off)
    with pytest.raises(SystemExit):
        run("toy", 5, tmp_path / "out", CPU, save_minutes=0)
    card = json.loads((tmp_path / "out" / "toy.json").read_text())
    pretrain.join("toy", tmp_path / "out", tmp_path / "home")
    assert card["images_seen"] == 8 * (moment - 1)
    # Somebody who brought it home may ship it, and the next piece goes on from there.
    for path in (tmp_path / "home").iterdir():
        (assets / path.name).write_bytes(path.read_bytes())
    (assets / "toy.yaml").write_text(RECIPE)
    monkeypatch.setattr(pretrain.edm, "edm_loss", real)
    later = run("toy", 0.5, tmp_path / "more", CPU, steps=2, side=2)
    assert later["optimizer_restarted_at_images"] == card["images_seen"] < later["images_seen"]


def test_the_next_piece_goes_on_from_the_last_one_s_network(tmp_path, monkeypatch, rates):  # noqa: F811
    """Its own recipe, in batches of four of as many images as that takes."""
    recipe = pretrain.load_recipe(NAME)
    recipe["training"] |= {"batch_size": 4, "log_every": 1}
    images = np.random.default_rng(0).integers(0, 256, (16, 32, 32, 3), np.uint8)
    monkeypatch.setattr(pretrain, "load_recipe", lambda name: recipe)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: (images, np.arange(16) % 10))
    card, before = run(NAME, 0.05, tmp_path, CPU, steps=2, side=1), checkpoints.model_card(recipe["start"])
    assert card["images_seen"] == before["images_seen"] + 12 and card["finished"]
    assert card["optimizer_restarted_at_images"] == before["images_seen"]
    assert card["loss_curve"][:-3] == before["loss_curve"] and card["recipe"]["start"] == "cifar10-edm-gpu"
    old = checkpoints.read_tensors(checkpoints.ASSETS / "cifar10-edm-gpu.safetensors")[0]
    new = checkpoints.read_tensors(pretrain.join(NAME, tmp_path, tmp_path / "home"))[0]
    moved = [(new[key].float() - value.float()).norm() / value.float().norm() for key, value in old.items()]
    assert 0 < max(moved) < 0.1  # three steps from there, not from initial weights
    assert (tmp_path / f"{NAME}.png").exists()
