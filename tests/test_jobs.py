"""The steps end to end with tiny random networks: same images whatever the batch, a kill, or a second run."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import torch

from dgutils import training as training_module
from dgutils.arrays import as_features
from dgutils.discriminator import MemberConfig
from dgutils.errors import UserError
from dgutils.networks import checkpoints
from dgutils.networks import features as spaces
from dgutils.networks.adm import EncoderUNet
from dgutils.networks.edm import Denoiser
from dgutils.pipeline import jobs
from dgutils.pipeline import store as store_module
from dgutils.pipeline.store import Store
from dgutils.results import provenance
from dgutils.results import records as results
from dgutils.terminal import log_file

SCORE = dict(img_resolution=32, img_channels=1, patch_size=4, model_channels=8, channel_mult=(1, 2), num_blocks=1,
             attn_resolutions=())  # fmt: skip
EXTRACTOR = dict(image_size=32, in_channels=1, model_channels=16, out_channels=3, num_res_blocks=1,
                 attention_resolutions=(), channel_mult=(1, 1), num_head_channels=16, patch_size=4,
                 num_group_channels=4)  # fmt: skip
HEAD = dict(image_size=4, in_channels=16, model_channels=16, out_channels=1, num_res_blocks=1,
            attention_resolutions=[1], channel_mult=[1], num_head_channels=16, num_group_channels=4)  # fmt: skip
MEMBERS = (MemberConfig("a", 1e-2, 0.0, 2), MemberConfig("b", 1e-3, 1e-7, 1, 0.01))


def random_network(cls, config, seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = cls(**config)
        for parameter in network.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return network.eval().requires_grad_(False)


def use_tiny_networks(monkeypatch):
    score, extractor = random_network(Denoiser, SCORE, 0), random_network(EncoderUNet, EXTRACTOR, 1)
    monkeypatch.setattr(checkpoints, "load_denoiser", lambda name: score)
    monkeypatch.setattr(checkpoints, "load_feature_extractor", lambda name: extractor)
    monkeypatch.setattr(checkpoints, "weights_digest", lambda name: f"weights of {name}")
    monkeypatch.setattr(checkpoints, "clock", lambda name: "linear")


@pytest.fixture(autouse=True)
def tiny_networks(monkeypatch):
    use_tiny_networks(monkeypatch)


def sampling(**changes):
    settings = dict(score_network="tiny", num_steps=4, batch_size=8, shard_size=8, precision="float32")
    return jobs.Sampling(**(settings | changes))


def training(**changes):
    return jobs.Training(**(dict(dataset="fashion_mnist", feature_extractor="tiny", head=HEAD, members=MEMBERS,
                                 num_real=40, batch_size=8, precision="float32") | changes))  # fmt: skip


@pytest.fixture
def store(tmp_path):
    log = []
    store = Store(tmp_path, log.append)
    store.lines = log
    return store


@pytest.fixture
def trained(store):
    return jobs.Trained(store, training(), jobs.ImageSet(store, sampling(), 40).ensure()).ensure()


def test_images_do_not_depend_on_the_batch_size(store, trained):
    """Batches of 1, 7 and 64 agree to a grey level, guided with boosting or not."""
    guidances = (None, jobs.Guidance(trained, (0, 1), "mean_probability", boosting="released"))
    for guidance in guidances:
        sets = [
            jobs.ImageSet(store, sampling(batch_size=size, shard_size=size), 64, 100, guidance).images.astype(int)
            for size in (1, 7, 64)
        ]
        assert max(np.abs(a - sets[0]).max() for a in sets[1:]) <= 1
    assert sets[0].std() > 1


def test_second_run_hits_and_larger_sets_extend(store):
    first = jobs.ImageSet(store, sampling(), 16).ensure().images
    store.lines.clear()
    more = jobs.ImageSet(store, sampling(), 24).ensure().images
    assert np.array_equal(more[:16], first) and "2 of 3 shards stored" in store.lines[0]
    store.lines.clear()
    jobs.ImageSet(store, sampling(), 24).ensure()
    assert store.lines[0].startswith("HIT")
    jobs.ImageSet(store, sampling(num_steps=5), 8).ensure()
    assert store.lines[-1].startswith("MISS")


def test_training_is_found_and_its_states_differ(store, trained):
    again = jobs.Trained(store, training(), trained.fakes).ensure()
    assert store.lines[-1].startswith("HIT") and again.digest == trained.digest
    assert [len(h) for h in trained.history] == [2, 1]
    one, both = trained.ensemble([0]), trained.ensemble([0, 1])
    x, t = torch.randn(3, 1, 32, 32), torch.tensor(0.1)
    assert torch.equal(one.logits(x, t)[0], both.logits(x, t)[0])
    assert not torch.equal(both.logits(x, t)[0], both.logits(x, t)[1])
    with pytest.raises(UserError, match="members 0 to 1"):
        trained.ensemble([2])


def test_interrupted_training_goes_on_to_the_same_bits(store, trained, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    other, epochs = Store(tmp_path / "other", lambda line: None), []

    def killed_after_first_epoch(store, name, data):
        real(store, name, data)
        epochs.append(name)
        raise Killed

    fakes, real = jobs.ImageSet(other, sampling(), 40).ensure(), Store.save_partial
    monkeypatch.setattr(Store, "save_partial", killed_after_first_epoch)
    with pytest.raises(Killed):
        jobs.Trained(other, training(), fakes).ensure()
    monkeypatch.setattr(Store, "save_partial", real)
    resumed = jobs.Trained(other, training(), fakes).ensure()
    assert epochs and resumed.history == trained.history
    for key, value in trained._tensors.items():
        assert torch.equal(value, resumed._tensors[key]), key
    assert not list((other.root / "partial").iterdir())


def test_splits_are_balanced_and_held_out(store, trained):
    parts = trained.splits
    assert [len(p.labels) for p in parts] == [64, 8, 8]
    assert all(p.labels.mean() == 0.5 for p in parts)
    logits, labels = jobs.held_out_logits(store, trained, [0.1, 0.5])
    assert logits.shape == (2, 2, 8) and np.array_equal(labels, parts[2].labels)


def test_scores_pair_equal_seeds_only(store):
    a = jobs.ImageSet(store, sampling(), 40, label="a").ensure()
    b = jobs.ImageSet(store, sampling(num_steps=3), 40, label="b").ensure()
    other = jobs.ImageSet(store, sampling(), 40, first_seed=8, label="other seeds").ensure()
    real = jobs.RealSet("fashion_mnist", "test", 60)
    scores = [jobs.Score(store, arm, real, "tiny", 20).ensure() for arm in (a, b, other)]
    interval = scores[1].minus(scores[0])
    assert interval.value == pytest.approx(scores[1].fd.value - scores[0].fd.value) and interval.low < interval.high
    assert scores[0].minus(scores[0], "kid").low == scores[0].minus(scores[0], "kid").high == 0
    with pytest.raises(UserError, match="other seeds"):
        scores[2].minus(scores[0])


# --- named first, made when asked for; scores that the repository keeps


def guided_arm(store, n=40):
    """Images guided by discriminators, none of which exists yet."""
    trained = jobs.Trained(store, training(), jobs.ImageSet(store, sampling(), 40))
    return jobs.ImageSet(store, sampling(), n, 100, jobs.Guidance(trained, (0, 1)))


def test_nothing_is_made_before_it_is_asked_for_and_then_all_it_needs(store):
    arm = guided_arm(store)
    assert arm.digest and not store.lines and not list(store.root.iterdir())
    assert arm.first(5).images.shape == (5, 32, 32, 1)
    assert [line.split()[1] for line in store.lines if line.startswith("MISS")] == ["generate", "train", "generate"]
    assert len(arm.rows.missing(40)) == 4  # one shard of five is drawn
    assert np.array_equal(arm.images[:5], arm.first(5).images) and arm.first(99).n == 40


def test_damaged_discriminators_are_trained_again_before_they_are_used(store, trained):
    heads = trained.artifact.path / "heads.safetensors"
    whole = heads.read_bytes()
    heads.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    again = jobs.Trained(store, training(), jobs.ImageSet(store, sampling(), 40))
    assert again.ensemble([0]) and heads.read_bytes() == whole
    assert any(line.startswith("QUARANTINED") for line in store.lines)


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """A clone in which an arm was scored and its scores kept, while all else was removed since; and those scores."""
    monkeypatch.setenv("DGUTILS_ROOT", str(tmp_path))
    real = jobs.RealSet("fashion_mnist", "test", 60)
    scores = jobs.Score(jobs.open_store("smoke"), guided_arm(jobs.open_store("smoke")), real, "tiny", 20).ensure()
    path = results.keep("smoke")
    shutil.rmtree(tmp_path / "runs")
    return path, scores


def test_scores_that_are_kept_need_no_images(kept):
    store, real = jobs.open_store("smoke"), jobs.RealSet("fashion_mnist", "test", 60)
    again = jobs.Score(store, guided_arm(store), real, "tiny", 20).ensure()
    assert (again.fd.value, again.kid.value, again.manifold) == (kept[1].fd.value, kept[1].kid.value, kept[1].manifold)
    assert np.array_equal(again.kid.draws, kept[1].kid.draws)
    assert not store.root.exists() and "kept in" in log_file("smoke").read_text()
    made = provenance.lineage("smoke", [again.digest])  # down to the networks
    assert {entry.get("step") for entry in made.values()} == {"evaluate", "generate", "train", None}
    assert {"tiny"} <= {entry["label"] for entry in made.values()}
    other = jobs.Score(store, guided_arm(store), real, "tiny", 21).ensure()  # another score is not kept: all is made
    assert other.fd.value == again.fd.value and store.root.exists()
    results.keep("smoke")
    assert len(json.loads(kept[0].read_text())["scores"]) == 2


def test_scores_in_the_store_come_before_those_that_are_kept(kept):
    content = store_module.read_kept(kept[0])
    for scores in content["scores"].values():
        scores["fd"]["value"] = 0.0
    store_module.write_sealed(kept[0], content, 0)
    store, real = jobs.open_store("smoke"), jobs.RealSet("fashion_mnist", "test", 60)
    assert jobs.Score(store, guided_arm(store), real, "tiny", 20).ensure().fd.value == 0
    jobs.Score(store, guided_arm(store), real, "tiny", 20).artifact.ensure(
        lambda folder: (folder / "scores.json").write_text(json.dumps(content["scores"].popitem()[1] | {
            "fd": {"value": 7.0, "draws": [7.0]}})))
    assert jobs.Score(store, guided_arm(store), real, "tiny", 20).ensure().fd.value == 7


@pytest.mark.parametrize("damage", [
    lambda text: text[:-9], lambda text: text.replace('"value": ', '"value": 1', 1), lambda text: "[]",
    lambda text: ""])  # fmt: skip
def test_damaged_file_of_kept_scores_is_one_line(kept, damage):
    kept[0].write_text(damage(kept[0].read_text()))
    with pytest.raises(UserError, match=r"scores\.json is damaged: restore it with git, or remove it"):
        store = jobs.open_store("smoke")
        jobs.Score(store, guided_arm(store), jobs.RealSet("fashion_mnist", "test", 60), "tiny", 20).ensure()


def test_no_scores_to_keep_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("DGUTILS_ROOT", str(tmp_path))
    with pytest.raises(UserError, match="profile smoke has no scores to keep: run `make reproduce PROFILE=smoke`"):
        results.keep("smoke")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: jobs.ImageSet(s, sampling(batch_size=3), 4).ensure(), "not a multiple of batch_size"),
        (lambda s: jobs.ImageSet(s, sampling(), 0).ensure(), "at least 1"),
        (lambda s: jobs.ImageSet(s, sampling(num_steps=1), 8).ensure(), "num_steps >= 2"),
        (lambda s: jobs.RealSet("fashion_mnist", "test", 20_000).images, "has 10000 test images"),
        (lambda s: jobs.Trained(s, training(num_real=16), jobs.ImageSet(s, sampling(), 8)).ensure(),
         "as many of each"),
        (lambda s: jobs.features(s, jobs.RealSet("fashion_mnist", "test", 4), "efficientnet-b7"), "feature space"),
    ],
)
def test_bad_configs_are_one_clear_line(store, call, message):
    with pytest.raises(UserError, match=message) as caught:
        call(store)
    assert "\n" not in str(caught.value)


def test_images_survive_kill_9_in_the_middle(tmp_path):
    """SIGKILL a sampling process after its first shard: the next run reuses it and ends with the same bits."""
    script = textwrap.dedent(f"""
        import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})
        import test_jobs as t
        from dgutils.networks import checkpoints
        from dgutils.pipeline import jobs
        from dgutils.pipeline.store import Store
        score = t.random_network(t.Denoiser, t.SCORE, 0)
        checkpoints.load_denoiser = lambda name: score
        checkpoints.weights_digest = lambda name: "weights of " + name
        jobs.ImageSet(Store(sys.argv[1]), t.sampling(), 64).ensure()
    """)
    victim = subprocess.Popen([sys.executable, "-c", script, tmp_path / "killed"], stderr=subprocess.DEVNULL)
    while not list((tmp_path / "killed").glob("generate/*/shard_00001")) and victim.poll() is None:
        time.sleep(0.002)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    finished = len(list((tmp_path / "killed").glob("generate/*/shard_?????/manifest.json")))
    lines = []
    resumed = jobs.ImageSet(Store(tmp_path / "killed", lines.append), sampling(), 64).ensure()
    assert 2 <= finished < 8 and "of 8 shards stored" in lines[0], (finished, lines)
    whole = jobs.ImageSet(Store(tmp_path / "whole", lines.append), sampling(), 64).ensure()
    assert np.array_equal(resumed.images, whole.images)


def test_likelihoods_are_found_again_resumed_and_the_same_in_any_batch(store):
    fakes, real = jobs.ImageSet(store, sampling(), 40), jobs.RealSet("fashion_mnist", "test", 6)
    guide = jobs.Guidance(jobs.Trained(store, training(), fakes), (0,), weight_1st_order=2.0, boosting="released")
    one = jobs.Likelihood(store, real, sampling(batch_size=4), guide, levels=3)
    assert one.lacks and one.sources == guide.discriminators.trainings and not list(store.root.glob("*"))
    first, shards = one.ensure(), list(store.root.glob("likelihood/*/shard_*"))
    assert len(shards) == 2 and not one.lacks
    shutil.rmtree(shards[1])
    again = jobs.Likelihood(store, real, sampling(batch_size=4), guide, levels=3)
    assert again.digest == one.digest and again.lacks
    assert again.ensure().value == first.value and np.array_equal(again.ensure().draws, first.draws)
    made = len(store.lines)
    assert jobs.Likelihood(store, real, sampling(batch_size=4), guide, levels=3).ensure().value == first.value
    assert [line.split()[0] for line in store.lines[made:]] == ["HIT"]
    other = jobs.Likelihood(store, real, sampling(batch_size=2), guide, levels=3)
    assert abs(other.ensure().value - first.value) < 1e-3  # in batches of another size
    plain = jobs.Likelihood(store, real, sampling(batch_size=4), levels=3)
    assert plain.sources == () and plain.ensure().value != first.value
    assert first.minus(plain.ensure()).value == first.value - plain.ensure().value
    # of guidance the mean of both weights counts, unboosted
    same = jobs.replace(guide, weight_1st_order=0.0, weight_2nd_order=2.0, boosting="none")
    assert jobs.Likelihood(store, real, sampling(batch_size=4), same, levels=3).digest == one.digest


class Worse:
    """A network that stands for a copy of "tiny"."""

    digest = "worse"

    def __init__(self):
        self.network, self.made = random_network(Denoiser, SCORE, 5), 0

    def ensure(self):
        self.made += 1


def test_images_are_led_away_from_a_copy_in_denoisers_and_in_weights(store):
    worse, plain = Worse(), jobs.ImageSet(store, sampling(), 8).ensure()
    arms = {(weight, way): jobs.ImageSet(store, sampling(worse=worse, worse_weight=weight, in_weights=way), 8)
            for weight in (0.0, 0.5) for way in (False, True)}
    assert len({arm.digest for arm in arms.values()} | {plain.digest}) == 5 and arms[0.5, True].sources == (worse,)
    for (weight, _), arm in arms.items():
        assert arm.rows.artifact.identity["inputs"]["worse"] == "worse"
        off = np.abs(arm.images.astype(int) - plain.images.astype(int))
        assert off.max() <= 1 if weight == 0 else off.mean() > 1
        assert arm.calls.tolist() == [[7, 0]] * 8
    assert worse.made >= 4 and not np.array_equal(arms[0.5, True].images, arms[0.5, False].images)
    named = jobs.ImageSet(store, sampling(worse="tiny", worse_weight=1.0), 8)  # itself: nothing to lead away from
    assert named.sources == () and np.abs(named.images.astype(int) - plain.images.astype(int)).max() <= 1


def test_images_that_are_rejected_are_the_same_in_any_batch_and_say_what_they_asked_for(store, trained):
    guide = jobs.Guidance(trained, (0,), weight_1st_order=0.0, rejection=0.5)
    sets = [jobs.ImageSet(store, sampling(batch_size=size, shard_size=24), 24, 100, guide) for size in (8, 24)]
    one, other = (images.ensure() for images in sets)
    assert np.abs(one.images.astype(int) - other.images.astype(int)).max() <= 1
    assert np.array_equal(one.calls, other.calls) and one.calls[:, 0].min() == 7 < one.calls[:, 0].max()
    plain = jobs.ImageSet(store, sampling(), 24, 100).ensure()
    same = (one.images == plain.images).all((1, 2, 3))
    assert 0 < same.sum() < 24 and (one.calls[same, 0] == 7).all() and (one.calls[~same, 0] > 7).all()
    with pytest.raises(UserError, match="give a quantile, and no boosting with it"):
        jobs.replace(guide, boosting="released")


def test_heads_that_learn_by_the_denoisers_error_lower_it(store, monkeypatch):
    monkeypatch.setattr(training_module, "_records", lambda device, parts: True)
    monkeypatch.setattr(training_module, "RecordedStep", None)  # which knows cross-entropy alone
    fakes = jobs.ImageSet(store, sampling(), 40)
    usual, ours = (jobs.Trained(store, training(members=(MemberConfig("a", 1e-2, 0.0, 6),), **how), fakes)
                   for how in ({}, {"denoiser": "tiny"}))
    assert usual.digest != ours.digest
    losses = [row["val_loss"] for row in ours.ensure().history[0]]
    assert np.isfinite(losses).all() and losses[-1] < losses[0]
    assert np.isnan(ours.history[0][0]["val_accuracy"])  # it sees no generated image


GOLDEN = os.path.join(os.path.dirname(__file__), "golden.json")


def measured(store) -> dict:
    """A few numbers of every step at its present version, with tiny networks in float32."""
    fakes = jobs.ImageSet(store, sampling(), 40).ensure()
    # A rate at which training is not chaotic: weights off by 1e-5 of themselves, as by another machine's rounding,
    # move the second epoch's loss by 0.02 at a rate of 1e-2, by 2e-6 at 1e-3.
    members = (MemberConfig("a", 1e-3, 0.0, 2), MEMBERS[1])
    trained = jobs.Trained(store, training(members=members), fakes).ensure()
    # Untrained heads: training's last digits differ between machines, and the sampler would magnify them.
    guidance = jobs.Guidance(trained, (0, 1), "mean_probability", "initial", boosting="released")
    x = jobs.sample(sampling(), range(2), guidance)
    real = jobs.RealSet("fashion_mnist", "test", 60)
    scores = jobs.Score(store, fakes, real, "tiny", 5).ensure()
    few = jobs.RealSet("fashion_mnist", "test", 4)
    nll = jobs.Likelihood(store, few, sampling(), guidance, levels=3)
    nll.ensure()
    numbers = {
        "generate": x[0, 0, ::7, ::7].flatten().tolist(),
        "train": [row["val_loss"] for history in trained.history for row in history],
        "logits": jobs.held_out_logits(store, trained, [0.1])[0].flatten()[:8].tolist(),
        "features": jobs.features(store, fakes, "tiny")[0].tolist(),
        "evaluate": [scores.fd.value, scores.kid.value, *scores.fd.draws, *scores.manifold.values()],
        "likelihood": nll.rows.load(4, "bits").tolist(),
    }
    return {step: {"version": jobs.VERSIONS[step], "values": values} for step, values in numbers.items()}


def test_numbers_change_only_with_their_version(store):
    """If this fails and the change was meant: raise the step's version in jobs.VERSIONS, then run this file."""
    with open(GOLDEN) as file:
        golden = json.load(file)
    assert golden.keys() == jobs.VERSIONS.keys()
    for step, now in measured(store).items():
        same = np.allclose(now["values"], golden[step]["values"], rtol=2e-3, atol=2e-4)
        assert golden[step]["version"] == now["version"], f"{step}: new version; run `python tests/test_jobs.py`"
        assert same, f"{step}: its numbers changed and jobs.VERSIONS['{step}'] did not"


def test_images_whose_features_are_not_finite_are_named_by_seed(store, monkeypatch):
    images, extract = jobs.ImageSet(store, sampling(), 24, 100).ensure(), spaces.extract
    bad = images.images[[10, 17]]

    def spoilt(pixels, encode, *arguments, **options):
        features = extract(pixels, encode, *arguments, **options)
        features[[any(np.array_equal(image, other) for other in bad) for image in pixels]] = np.nan
        return as_features(features)

    monkeypatch.setattr(spaces, "extract", spoilt)
    monkeypatch.setattr(jobs, "FEATURE_SHARD", 8)
    with pytest.raises(UserError, match=r"images: the tiny features of 1 images are not finite, seeds \[110\]: look"):
        jobs.features(store, images, "tiny")


if __name__ == "__main__":
    import tempfile

    use_tiny_networks(pytest.MonkeyPatch())
    with tempfile.TemporaryDirectory() as folder:
        content = measured(Store(folder, print))
    with open(GOLDEN, "w") as file:
        json.dump(content, file, indent=1)
