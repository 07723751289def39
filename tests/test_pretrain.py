"""Training of the shipped networks: resumable to the same bits, and cards that describe what is shipped."""

import json
import os
import re
import signal

import pytest
import torch
import yaml

from dgutils import datasets
from dgutils.errors import UserError
from dgutils.networks import checkpoints, pretrain

RECIPE = """
what: a test
licence: MIT
dataset: fashion_mnist
architecture: Denoiser
config: {img_resolution: 32, img_channels: 1, patch_size: 4, model_channels: 8, channel_mult: [1], num_blocks: 1,
         attn_resolutions: []}
training: {images: 48, decay_images: 24, batch_size: 8, learning_rate: 1.0e-2, warmup_steps: 2, weight_decay: 0.0,
           ema_half_life: 20, horizontal_flip: true, precision: float32, seed: 3, log_every: 2}
"""


@pytest.fixture
def assets(tmp_path, monkeypatch):
    folder = tmp_path / "assets"
    folder.mkdir()
    (folder / "toy.yaml").write_text(RECIPE)
    for module in (checkpoints, pretrain):
        monkeypatch.setattr(module, "ASSETS", folder)
    monkeypatch.setattr(pretrain, "_evaluate", lambda *args: {})
    datasets.load_dataset("fashion_mnist", "train")  # remembered: trainings by the clock have a second or two
    checkpoints._load.cache_clear()
    return folder


def killed_at_the_fourth_step(out, monkeypatch) -> list:
    """Begin a training that dies there; what is returned grows by one with each step begun, then and later."""
    real, calls = pretrain.edm.edm_loss, []

    def dies_at_the_fourth_step(*args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(pretrain.edm, "edm_loss", dies_at_the_fourth_step)
    with pytest.raises(KeyboardInterrupt):
        pretrain.train_network("toy", out, save_minutes=0)
    return calls


def test_killed_training_goes_on_to_the_same_bits(assets, tmp_path, monkeypatch):
    whole = pretrain.train_network("toy", tmp_path / "whole")
    calls = killed_at_the_fourth_step(tmp_path / "killed", monkeypatch)
    assert len(calls) == 4
    resumed = pretrain.train_network("toy", tmp_path / "killed", save_minutes=0)
    assert len(calls) == 7  # three steps done, three to go
    assert resumed.read_bytes() == whole.read_bytes()
    card = json.loads(resumed.with_suffix(".json").read_text())
    assert card["finished"] and card["images_seen"] == 48
    assert [row["images"] for row in card["loss_curve"]] == [16, 32, 48]


def test_another_recipe_does_not_touch_the_checkpoint(assets, tmp_path):
    pretrain.train_network("toy", tmp_path / "out")
    (assets / "toy.yaml").write_text(RECIPE.replace("seed: 3", "seed: 4"))
    with pytest.raises(UserError, match="another recipe"):
        pretrain.train_network("toy", tmp_path / "out")


def test_goes_on_from_unfinished_shipped_weights(assets, tmp_path):
    trained = pretrain.train_network("toy", tmp_path / "out")
    card = json.loads(trained.with_suffix(".json").read_text()) | {"finished": False, "images_seen": 32}
    (assets / "toy.safetensors").write_bytes(trained.read_bytes())
    (assets / "toy.json").write_text(json.dumps(card))
    result = pretrain.train_network("toy", tmp_path / "elsewhere")
    card = json.loads(result.with_suffix(".json").read_text())
    assert card["optimizer_restarted_at_images"] == 32 and card["images_seen"] == 48
    assert result.read_bytes() != trained.read_bytes()


def test_goes_on_from_the_weights_of_another_network(assets, tmp_path):
    first = pretrain.train_network("toy", tmp_path / "out")
    for path in (first, first.with_suffix(".json")):
        (assets / path.name).write_bytes(path.read_bytes())
    longer_recipe = RECIPE.replace("images: 48", "images: 96") + "start: toy\n"
    (assets / "longer.yaml").write_text(longer_recipe)
    longer = pretrain.train_network("longer", tmp_path / "out")
    card = json.loads(longer.with_suffix(".json").read_text())
    assert card["optimizer_restarted_at_images"] == 48 and card["images_seen"] == 96 and card["finished"]
    assert [row["images"] for row in card["loss_curve"]] == [16, 32, 48, 64, 80, 96]
    # That it really begins there: without a step, those are the weights it ends with.
    (assets / "still.yaml").write_text(longer_recipe.replace("learning_rate: 1.0e-2", "learning_rate: 0.0"))
    still = checkpoints.read_tensors(pretrain.train_network("still", tmp_path / "out"))[0]
    assert all(torch.equal(still[key], value) for key, value in checkpoints.read_tensors(first)[0].items())


@pytest.mark.parametrize("start, change, message", [
    ("tyo", ("", ""), "tyo"),
    ("toy", ("model_channels: 8", "model_channels: 16"), "'longer' cannot go on from 'toy': give both the same"),
    ("toy", ("images: 96", "images: 48"), "which has seen 48 images: give it more than its 48"),
])  # fmt: skip
def test_a_start_that_does_not_fit_is_refused(assets, tmp_path, start, change, message):
    first = pretrain.train_network("toy", tmp_path / "out")
    for path in (first, first.with_suffix(".json")):
        (assets / path.name).write_bytes(path.read_bytes())
    recipe = RECIPE.replace("images: 48", "images: 96").replace(*change)
    (assets / "longer.yaml").write_text(recipe + f"start: {start}\n")
    with pytest.raises(UserError, match=message):
        pretrain.train_network("longer", tmp_path / "out")


def test_learning_rate_warms_up_stays_and_decays():
    training = dict(learning_rate=1.0, warmup_steps=10)
    rates = [pretrain.learning_rate(training, step, step, 100, 40) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[50] == 1
    assert rates[80] == pytest.approx(0.5) and rates[99] < 0.01


@pytest.fixture
def rates(monkeypatch):
    """The learning rates of a training whose every step takes a second of its own clock, on however busy a machine."""
    now, real, rates = [0.0], pretrain.learning_rate, []

    def noted(*args):
        now[0] += 1.0
        rates.append(real(*args))
        return rates[-1]

    monkeypatch.setattr(pretrain.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(pretrain, "learning_rate", noted)
    return rates


def test_by_the_clock_the_learning_rate_falls_over_the_share_of_the_minutes(assets, tmp_path, rates):
    """The recipe's last half of the images is the last half of the time, whatever a step takes."""
    pretrain.train_network("toy", tmp_path / "out", minutes=0.5)
    assert len(rates) == 30 and rates[1] == rates[14] == 1e-2
    assert rates[22] == pytest.approx(5e-3, rel=0.2) and 0 < rates[29] < 1e-3


def test_two_trainings_of_one_network_in_one_folder_are_refused(assets, tmp_path, monkeypatch):
    def second(weights):
        with pytest.raises(UserError, match="another process trains it: wait, or give another folder"):
            pretrain.train_network("toy", tmp_path / "out")
        seen.append(pretrain.train_network("toy", tmp_path / "elsewhere"))

    seen = []
    pretrain.train_network("toy", tmp_path / "out", saved=second)
    assert len(seen) == 1
    pretrain.train_network("toy", tmp_path / "out")  # afterwards it is free again


def test_diverging_training_stops_with_its_step(assets, tmp_path, monkeypatch):
    real = pretrain.edm.edm_loss
    monkeypatch.setattr(pretrain.edm, "edm_loss", lambda *args: real(*args) * float("nan"))
    with pytest.raises(UserError, match="step 0: lower learning_rate"):
        pretrain.train_network("toy", tmp_path / "out")


def test_unknown_recipe_lists_those_that_exist(assets):
    with pytest.raises(UserError, match="there are: toy"):
        pretrain.load_recipe("tyo")


def of_training(**values):
    """RECIPE with other values in its training, written as in YAML."""
    text = RECIPE
    for name, value in values.items():
        assert f" {name}: " in text or f"{{{name}: " in text
        text = re.sub(rf"([{{ ]{name}): [^,}}]*", rf"\1: {value}", text)
    return text


WRONG = {
    "nothing": ("", "toy.yaml is no recipe"), "a list": ("[]", "toy.yaml is no recipe"),
    "no YAML": ("a: {", "toy.yaml is not YAML: while parsing"),
    "Latin-1": (b"# \xe9\n", "toy.yaml is not YAML: unacceptable character"),
    "no architecture": (RECIPE.replace("architecture:", "architektur:"), "KeyError: 'architecture'"),
    "another architecture": (RECIPE.replace("Denoiser", "Transformer"), "KeyError: 'Transformer'"),
    "an unknown option": (RECIPE.replace("config: {", "config: {zz: 3, "), "toy.yaml is no recipe .*'zz'"),
    "no batch": (of_training(batch_size="0"), "batch_size is 0: give a number, at least 1"),
    "half a batch": (of_training(batch_size="1.5"), "batch_size is 1.5"),
    "no images": (of_training(images="0"), " images is 0: give a number"),
    "a rate in words": (of_training(learning_rate="1e-4"), "learning_rate is '1e-4': give a number, .* as 1.0e-4 is"),
    "a rate below 0": (of_training(learning_rate="-1.0"), "learning_rate is -1.0"),
    "NaN": (of_training(weight_decay=".nan"), "weight_decay is nan"),
    "true": (of_training(log_every="true"), "log_every is True"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "message"), WRONG.values(), ids=WRONG)
def test_a_recipe_that_is_wrong_is_one_line_with_its_file(assets, tmp_path, text, message):
    (assets / "toy.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message) as error:
        pretrain.train_network("toy", tmp_path / "out")
    assert "\n" not in str(error.value) and "toy.yaml" in str(error.value)


@pytest.mark.parametrize("card", sorted(checkpoints.ASSETS.glob("*.json")), ids=lambda path: path.stem)
def test_shipped_weights_match_their_cards_and_recipes(card):
    content = json.loads(card.read_text())
    weights = card.with_suffix(".safetensors")
    assert checkpoints.sha256_of(weights) == content["sha256"]
    assert content["recipe"] == yaml.safe_load(card.with_suffix(".yaml").read_text())
    assert content["loss_curve"] and content["train_seconds"] > 0
    network = (checkpoints.load_denoiser if content["recipe"]["architecture"] == "Denoiser"
               else checkpoints.load_discriminator if content["recipe"]["config"]["out_channels"] == 1
               else checkpoints.load_feature_extractor)(card.stem)  # fmt: skip
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(content["parameters"], rel=1e-3)
    limit = 12 if content["recipe"]["dataset"] == "fashion_mnist" else 24
    assert weights.stat().st_size < limit * 2**20


def test_altered_weights_are_refused(assets, tmp_path):
    trained = pretrain.train_network("toy", tmp_path / "out")
    for path in (trained, trained.with_suffix(".json")):
        (assets / path.name).write_bytes(path.read_bytes())
    data = bytearray(trained.read_bytes())
    data[-1] ^= 1
    (assets / trained.name).write_bytes(data)
    with pytest.raises(UserError, match="restore it with"):
        checkpoints.load_denoiser("toy")
    (assets / trained.name).write_bytes(b"")
    with pytest.raises(UserError, match="restore it with"):
        checkpoints.load_denoiser("toy")
    with pytest.raises(UserError, match="not a readable safetensors"):
        checkpoints.read_tensors(assets / trained.name)


def test_minutes_end_a_training_and_a_later_call_goes_on(assets, tmp_path, rates):
    """Whatever the recipe's images: half a minute of seconds are more steps than its six."""
    (assets / "toy.yaml").write_text(RECIPE.replace("log_every: 2", "log_every: 1"))
    first = pretrain.train_network("toy", tmp_path / "out", minutes=0.5)
    card = json.loads(first.with_suffix(".json").read_text())
    assert card["finished"] and card["images_seen"] == 240 and card["device"] == "CPU"
    again = pretrain.train_network("toy", tmp_path / "out", minutes=0.5)
    later = json.loads(again.with_suffix(".json").read_text())
    assert later["images_seen"] == 480 and later["optimizer_restarted_at_images"] == 0
    assert later["loss_curve"][: len(card["loss_curve"])] == card["loss_curve"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_weights_card_and_checkpoint_to_go_on_from(assets, tmp_path, monkeypatch, number):
    real, calls = pretrain.edm.edm_loss, []

    def signalled_at_the_third_step(*args):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), number)
        return real(*args)

    whole = pretrain.train_network("toy", tmp_path / "whole")
    monkeypatch.setattr(pretrain.edm, "edm_loss", signalled_at_the_third_step)
    usual = signal.getsignal(number)
    stopped = pretrain.train_network("toy", tmp_path / "out")
    card = json.loads(stopped.with_suffix(".json").read_text())
    assert not card["finished"] and card["images_seen"] == 24 and signal.getsignal(number) == usual
    assert pretrain.train_network("toy", tmp_path / "out").read_bytes() == whole.read_bytes()


def test_power_lost_between_saves_leaves_weights_that_load(assets, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(pretrain, "_evaluate", lambda *args: seen.append(args) or {})
    real, calls = pretrain.edm.edm_loss, []

    def dies(*args):
        calls.append(1)
        if len(calls) == 5:
            raise SystemExit
        return real(*args)

    monkeypatch.setattr(pretrain.edm, "edm_loss", dies)
    with pytest.raises(SystemExit):
        pretrain.train_network("toy", tmp_path / "out", save_minutes=0)
    card = json.loads((tmp_path / "out" / "toy.json").read_text())
    assert card["images_seen"] == 32 and not card["finished"] and card["evaluation"] is None and not seen
    assert checkpoints.sha256_of(tmp_path / "out" / "toy.safetensors") == card["sha256"]


def test_weights_pass_in_parts_and_are_joined_by_their_checksum(assets, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "PART_BYTES", 3000)
    trained = pretrain.train_network("toy", tmp_path / "out")
    pretrain.write_parts(trained, tmp_path / "parts")
    parts = list((tmp_path / "parts").iterdir())
    assert len(parts) > 3 and max(part.stat().st_size for part in parts) == 3000
    (tmp_path / "parts" / "toy.json").write_bytes(trained.with_suffix(".json").read_bytes())
    joined = pretrain.join("toy", tmp_path / "parts", tmp_path / "joined")
    assert joined.read_bytes() == trained.read_bytes()
    parts[1].unlink()
    with pytest.raises(UserError, match="is one missing"):
        pretrain.join("toy", tmp_path / "parts", tmp_path / "joined")
    with pytest.raises(UserError, match="tyo.json is absent"):
        pretrain.join("tyo", tmp_path / "parts", tmp_path / "joined")


@pytest.mark.parametrize("minutes", [0, -1, float("nan"), float("inf")])
def test_impossible_minutes_are_refused(assets, tmp_path, minutes):
    with pytest.raises(UserError, match="give a number above 0"):
        pretrain.train_network("toy", tmp_path / "out", minutes=minutes)
