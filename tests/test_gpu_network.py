"""The piece that trains a network on a GPU, on a CPU: it brings home what it should, wherever it is cut off."""

import json
import random

import pytest
import torch
from gpu_network import run
from PIL import Image
from test_pretrain import RECIPE, assets, rates  # noqa: F401

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
