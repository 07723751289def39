"""Combination rules against closed forms, training against a known density ratio, restarts bit for bit."""

import copy
import json
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from dgutils import training
from dgutils.discriminator import (
    RESAMPLINGS,
    RULES,
    Ensemble,
    MemberConfig,
    evaluate_logits,
    perturb,
)
from dgutils.errors import UserError
from dgutils.networks.adm import EncoderUNet, init_head
from dgutils.noise import keyed_rng, vp_scale, vp_time_to_sigma
from dgutils.training import Split, TrainingSettings, train_discriminators

EXTRACTOR = dict(image_size=8, in_channels=1, model_channels=8, out_channels=3, num_res_blocks=0,
                 attention_resolutions=(), channel_mult=(1,), num_head_channels=8, patch_size=2, num_group_channels=4)
HEAD = dict(image_size=4, in_channels=8, model_channels=8, out_channels=1, num_res_blocks=0,
            attention_resolutions=(), channel_mult=(1,), num_head_channels=8, num_group_channels=4)


def network(config, seed, dtype=torch.float64):
    torch.manual_seed(seed)
    net = EncoderUNet(**config)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return net.to(dtype)


def one_member(extractor, head):
    return Ensemble(extractor, [head], "mean_logit")


def logits_like(*rows):
    return torch.tensor(rows, dtype=torch.float64, requires_grad=True)


def gradient(rule, logits):
    (grad,) = torch.autograd.grad(RULES[rule](logits).sum(), logits)
    return grad


# --- Rules ---


def test_mean_probability_is_the_logit_of_the_mean_probability():
    logits = 4 * torch.randn(6, 100, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    p = torch.sigmoid(logits).mean(dim=0)
    assert (RULES["mean_probability"](logits) - torch.log(p / (1 - p))).abs().max() < 1e-12


def test_mean_probability_is_finite_at_large_logits():
    logits = logits_like([80.0, -80.0, 80.0, 800.0], [80.0, -80.0, -80.0, 800.0])
    ratio = RULES["mean_probability"](logits)
    assert (ratio - torch.tensor([80.0, -80.0, 0.0, 800.0], dtype=torch.float64)).abs().max() < 1e-12
    assert gradient("mean_probability", logits).isfinite().all()
    in_float32 = RULES["mean_probability"](logits.detach().float())
    assert in_float32.isfinite().all() and (in_float32 - ratio).abs().max() < 1e-4


def test_mean_logit_gradient_is_the_mean_of_the_members_gradients():
    extractor, heads = network(EXTRACTOR, 0), [network(HEAD, seed) for seed in (1, 2, 3)]
    x = torch.randn(4, 1, 8, 8, dtype=torch.float64, requires_grad=True)
    ensemble = Ensemble(extractor, heads, "mean_logit")
    (together,) = torch.autograd.grad(ensemble.log_density_ratio(x, 0.4).sum(), x)
    apart = [torch.autograd.grad(one_member(extractor, h).log_density_ratio(x, 0.4).sum(), x)[0] for h in heads]
    assert (together - sum(apart) / 3).abs().max() < 1e-12
    assert (apart[0] - apart[1]).abs().max() > 1e-4


@pytest.mark.parametrize("rule", ["mean_probability", "mean_logit", "median_logit"])
def test_an_ensemble_of_clones_is_the_one(rule):
    extractor, head = network(EXTRACTOR, 0), network(HEAD, 1)
    x = torch.randn(5, 1, 8, 8, dtype=torch.float64, requires_grad=True)
    one = one_member(extractor, head).log_density_ratio(x, 0.3)
    six = Ensemble(extractor, [copy.deepcopy(head) for _ in range(6)], rule).log_density_ratio(x, 0.3)
    gradients = [torch.autograd.grad(ratio.sum(), x)[0] for ratio in (one, six)]
    assert one.abs().max() > 0.05 and gradients[0].abs().max() > 1e-3
    assert (one - six).abs().max() < 1e-12
    assert (gradients[0] - gradients[1]).abs().max() < 1e-12


def test_median_of_six_shares_between_the_middle_two():
    logits = logits_like([5.0], [-3.0], [1.0], [2.0], [-100.0], [100.0])
    assert RULES["median_logit"](logits).item() == 1.5
    assert gradient("median_logit", logits)[:, 0].tolist() == [0, 0, 0.5, 0.5, 0, 0]
    odd = logits_like([5.0], [-3.0], [1.0])
    assert RULES["median_logit"](odd).item() == 1
    assert gradient("median_logit", odd)[:, 0].tolist() == [0, 0, 1]


def test_raw_logits_as_probabilities_reproduces_the_fault():
    logits = logits_like([-2.0, 0.1, 0.5, 0.9, 3.0], [-1.0, 0.3, 0.5, 0.7, -0.5])
    m = logits.mean(dim=0)
    slope = gradient("raw_logits_as_probabilities", logits).sum(dim=0)  # d ratio / d m
    assert slope[0] == 0 and slope[4] == 0  # mean logits -1.5 and 1.25: outside (0, 1)
    assert (slope[1:4] - (1 / (m * (1 - m)))[1:4]).abs().max() < 1e-12
    assert slope[1:4].min() >= 4 - 1e-12
    ratio = RULES["raw_logits_as_probabilities"](logits)
    assert ratio[0] < -11.5 and ratio[4] > 11.5 and abs(ratio[2]) < 1e-12


# --- Ensembles and perturbation ---


class CountingExtractor(nn.Module):
    """Stands in for a network: per-image mean pixel as [N, 1, 1, 1], and NaN below a VP time."""

    def __init__(self, nan_below=0.0):
        super().__init__()
        self.anchor, self.calls, self.nan_below = nn.Parameter(torch.zeros(1)), 0, nan_below

    def features(self, x, vp_time):
        self.calls += 1
        features = x.mean(dim=(1, 2, 3), keepdim=True)
        return torch.where((vp_time < self.nan_below)[:, None, None, None], torch.nan, features)


PIXEL_HEAD = dict(image_size=1, in_channels=1, model_channels=16, out_channels=1, num_res_blocks=0,
                  attention_resolutions=(), channel_mult=(1,), num_head_channels=16, num_group_channels=4)


def test_logits_are_per_member_from_one_extractor_pass_and_networks_are_frozen():
    extractor, heads = CountingExtractor(), [network(PIXEL_HEAD, seed, torch.float32) for seed in range(4)]
    ensemble = Ensemble(extractor, heads, "mean_logit")
    logits = ensemble.logits(torch.randn(5, 1, 4, 4), torch.full((5,), 0.5))
    assert logits.shape == (4, 5) and extractor.calls == 1
    assert not any(p.requires_grad for p in ensemble.parameters())
    with pytest.raises(UserError, match="mean_probability"):
        Ensemble(extractor, heads, "average")
    with pytest.raises(UserError, match="at least one"):
        Ensemble(extractor, [], "mean_logit")


def test_perturb_has_the_vp_mean_and_standard_deviation():
    images = np.full((4000, 2, 2, 1), 255, np.uint8)
    for vp_time in (0.05, 0.5):
        time = torch.full((len(images),), vp_time, dtype=torch.float64)
        x = perturb(images, time, keyed_rng(0, 0)).double()
        mean = np.exp(-0.25 * vp_time**2 * 19.9 - 0.5 * vp_time * 0.1)
        std = np.sqrt(1 - mean**2)
        assert abs(x.mean().item() - mean) < 5 * std / np.sqrt(16000)
        assert abs(x.std().item() - std) < 5 * std / np.sqrt(2 * 16000)


def test_evaluate_logits_does_not_depend_on_the_batch_size():
    extractor, *heads = (network(c, s, torch.float32) for c, s in ((EXTRACTOR, 0), (HEAD, 1), (HEAD, 2)))
    ensemble = Ensemble(extractor, heads, "mean_logit")
    images = np.random.default_rng(0).integers(0, 256, (10, 8, 8, 1)).astype(np.uint8)
    times = [0.01, 0.3, 0.9]
    logits = evaluate_logits(ensemble, images, times, seed=3, batch_size=4)
    assert logits.shape == (2, 3, 10) and logits.dtype == np.float32
    assert np.abs(logits - evaluate_logits(ensemble, images, times, seed=3, batch_size=10)).max() < 1e-5
    assert np.abs(logits - evaluate_logits(ensemble, images, times, seed=4, batch_size=4)).max() > 1e-3
    x = perturb(images, torch.full((10,), 0.3, dtype=torch.float64), keyed_rng(3, 1, 0, 4))
    assert np.abs(logits[:, 1] - ensemble.logits(x, 0.3).numpy()).max() < 1e-5


# --- Training ---

MU, SPREAD, SIDE = 0.04, 0.25, 4


def two_gaussians(n, seed):
    """Images of independent pixels N(+-MU, SPREAD^2), + for the real ones (label 1)."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 2
    x = rng.normal((2 * labels - 1)[:, None, None, None] * MU, SPREAD, (n, SIDE, SIDE, 1))
    return np.clip(np.rint(127.5 * (x + 1)), 0, 255).astype(np.uint8), labels


def train_with(extractor, head, learn, validate, members, batch_size, seed=0, **options):
    """`train_discriminators`, settings and callbacks by name."""
    callbacks = {key: options.pop(key) for key in ("progress", "checkpoint", "resume") if key in options}
    settings = TrainingSettings(tuple(members), batch_size, seed, **options)
    return train_discriminators(extractor, partial(init_head, head, seed), Split(*learn), Split(*validate), settings,
                                **callbacks)


def train(members, extractor=None, n=192, batch_size=50, **options):
    return train_with(extractor or CountingExtractor(), PIXEL_HEAD, two_gaussians(n, 0), two_gaussians(64, 1), members,
                      batch_size, **options)


def member(name="m", epochs=2, learning_rate=1e-3, min_time=1e-5):
    return MemberConfig(name, learning_rate, 1e-3, epochs, min_time)


def equal_states(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_training_recovers_a_known_log_density_ratio():
    extractor = CountingExtractor()
    config = MemberConfig("m", learning_rate=2e-3, weight_decay=0.0, epochs=6)
    (trained,) = train([config], extractor, n=16384, batch_size=256)
    head = EncoderUNet(**PIXEL_HEAD)
    head.load_state_dict(trained.last_state)
    images, _ = two_gaussians(2048, 2)
    # An untrained head (log ratio 0) is off by 1.23, 0.66 and 0.21 on average; measured 0.27, 0.14, 0.10.
    for vp_time, bound in ((0.01, 0.45), (0.1, 0.30), (0.3, 0.17)):
        time = torch.full((len(images),), vp_time, dtype=torch.float64)
        x = perturb(images, time, keyed_rng(5, 0))
        # Pixel noised: N(+-a MU, a^2 (SPREAD^2 + sigma^2)), so log r = sum 2 MU x / (a (SPREAD^2 + sigma^2)).
        sigma = vp_time_to_sigma(time)[0]
        exact = 2 * MU * x.double().sum(dim=(1, 2, 3)) / (vp_scale(sigma) * (SPREAD**2 + sigma**2))
        error = (one_member(extractor, head).log_density_ratio(x, time).double() - exact).abs().mean().item()
        assert error < bound, (vp_time, error)
    assert [row["epoch"] for row in trained.history] == [1, 2, 3, 4, 5, 6]
    assert trained.history[-1]["train_loss"] < 0.64 and trained.history[-1]["val_accuracy"] > 0.55


def test_same_seed_same_bits_and_members_differ():
    members = [member("a"), member("b"), member("c", epochs=3)]
    first, second, other = train(members), train(members), train(members, seed=1)
    for a, b, c in zip(first, second, other, strict=True):
        assert equal_states(a.last_state, b.last_state) and equal_states(a.best_state, b.best_state)
        assert a.history == b.history != c.history
    assert not equal_states(first[0].last_state, first[1].last_state)
    assert [len(m.history) for m in first] == [2, 2, 3]
    torch.manual_seed(1234)  # neither torch's generator nor the other members have a say
    assert equal_states(train(members[:1])[0].last_state, first[0].last_state)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_any_number_of_threads_trains_to_the_same_bits(precision):
    class Pixels(CountingExtractor):
        """Computes nothing: what does may round differently with other threads."""

        def features(self, x, vp_time):
            return x

    head = dict(HEAD, image_size=8, in_channels=32, model_channels=32, num_res_blocks=1, num_head_channels=32)
    images, labels = np.random.default_rng(0).integers(0, 256, (128, 8, 8, 32), np.uint8), np.arange(128) % 2
    members, threads, states = [member("a", 1), member("b", 1, min_time=0.1)], torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        try:
            trained = train_with(Pixels(), head, (images, labels), (images[:32], labels[:32]), members, 64,
                                 precision=precision)  # fmt: skip
            assert torch.get_num_threads() == count
        finally:
            torch.set_num_threads(threads)
        states.append([one.last_state for one in trained])
    assert all(equal_states(a, b) for other in states[1:] for a, b in zip(states[0], other, strict=True))


def test_one_extractor_pass_a_batch_for_all_members():
    extractor = CountingExtractor()
    train([member("a"), member("b"), member("c", epochs=1)], extractor)
    assert extractor.calls == 2 * (192 // 50 + 2)  # two epochs; the incomplete training batch is left out


def test_best_state_is_that_of_the_lowest_validation_loss():
    (trained,) = train([member(epochs=5, learning_rate=0.03)])
    losses = [row["val_loss"] for row in trained.history]
    best = int(np.argmin(losses))
    assert best < 4  # such a learning rate overshoots: otherwise this test would show nothing
    (stopped,) = train([member(epochs=best + 1, learning_rate=0.03)])
    assert equal_states(trained.best_state, stopped.last_state)
    assert not equal_states(trained.best_state, trained.last_state)


@pytest.mark.parametrize("sequential", [False, True])
def test_resuming_after_any_epoch_gives_the_same_bits(sequential):
    members = [member("a", epochs=2), member("b", epochs=3, learning_rate=1e-2, min_time=0.1)]
    saved = []
    whole = train(members, sequential=sequential, checkpoint=lambda *state: saved.append(state))
    assert len(saved) == (5 if sequential else 3)
    for tensors, info in saved[:-1]:
        assert all(isinstance(v, torch.Tensor) and v.is_contiguous() for v in tensors.values())
        resumed = train(members, sequential=sequential, resume=(tensors, json.loads(json.dumps(info))))
        for a, b in zip(whole, resumed, strict=True):
            assert equal_states(a.last_state, b.last_state) and equal_states(a.best_state, b.best_state)
            assert a.history == b.history


def test_sequential_members_inherit_the_network():
    idle = member("b", epochs=1, learning_rate=0.0)
    one, two = train([member("a"), idle], sequential=True)
    assert equal_states(one.last_state, two.last_state)
    apart = train([member("a"), idle])
    assert equal_states(apart[0].last_state, one.last_state)
    assert not equal_states(apart[1].last_state, two.last_state)


def test_members_ignore_times_below_their_minimum():
    """Features are not finite below time 0.3; the first member whose loss shows it is named, and it is not "blind"."""
    with pytest.raises(UserError, match="discriminator seeing: its loss is not finite in epoch 1"):
        train([member("blind", min_time=0.3), member("seeing")], CountingExtractor(nan_below=0.3))


def test_bfloat16_trains_close_to_float32():
    rough, exact = (train([member()], precision=p)[0].history for p in ("bfloat16", "float32"))
    assert abs(rough[-1]["val_loss"] - exact[-1]["val_loss"]) < 0.02
    assert rough != exact


def test_progress_reports_every_row():
    rows = []
    trained = train([member("a", epochs=1), member("b")], progress=lambda name, row: rows.append((name, row)))
    expected = [("a", trained[0].history[0]), *(("b", row) for row in trained[1].history)]
    assert rows == expected


def test_user_errors():
    images, labels = two_gaussians(64, 0)
    arguments = (CountingExtractor(), PIXEL_HEAD, (images, labels), (images, labels))
    with pytest.raises(UserError, match="as many real as generated"):
        train_with(*arguments[:2], (images, labels * 0), arguments[3], [member()], 8)
    with pytest.raises(UserError, match="batch_size 65"):
        train_with(*arguments, [member()], 65)
    with pytest.raises(UserError, match="discriminator m"):
        train_with(*arguments, [member(min_time=1.0)], 8)
    with pytest.raises(UserError, match="unknown precision"):
        train_with(*arguments, [member()], 8, precision="float16")
    with pytest.raises(UserError, match="unknown clock 'sine'"):
        train_with(*arguments, [member()], 8, clock="sine")


# --- which images members see, and which epochs are kept


def small_images(n):
    """n real and n generated images of noise, with labels."""
    images = np.random.default_rng(0).integers(0, 256, (2 * n, 8, 8, 1), np.uint8)
    return images, np.repeat([1, 0], n)


def train_small(images=None, labels=None, epochs=2, seed=0, **options):
    """Two members, a few epochs."""
    if images is None:
        images, labels = small_images(12)
    members = [MemberConfig("a", 1e-3, 0.0, 1), MemberConfig("b", 1e-3, 0.0, epochs)]
    held_out = small_images(2)
    return train_with(network(EXTRACTOR, 0, torch.float32), HEAD, (images, labels), held_out, members, 8, seed,
                      **options)


def test_resamplings_are_what_they_say():
    labels = np.repeat([1, 0], 60)
    boot = RESAMPLINGS["bootstrap"](labels, 3, 0)
    assert (boot.sum(1) == len(labels)).all() and (boot[0] != boot[1]).any()
    assert 0.55 < (boot > 0).mean() < 0.72  # 1 - 1/e of the images at least once
    parts = RESAMPLINGS["disjoint"](labels, 6, 0)
    assert (parts.sum(0) == 1).all() and (parts[:, labels == 1].sum(1) == 10).all() and (parts.sum(1) == 20).all()
    assert (RESAMPLINGS["none"](labels, 2, 0) == 1).all()
    with pytest.raises(UserError, match="unknown resampling 'jackknife': choose one of none, bootstrap, disjoint"):
        train_small(resampling="jackknife")


def test_a_member_of_disjoint_parts_does_not_know_the_others_images():
    """Changing every image of part 1 leaves the member of part 0 as it was, and changes the member of part 1."""
    images, labels = small_images(24)
    part = RESAMPLINGS["disjoint"](labels, 2, 3)[1].astype(bool)
    changed = images.copy()
    changed[part] = 255 - changed[part]
    a, b = (train_small(images=i, labels=labels, resampling="disjoint", seed=3) for i in (images, changed))
    same = [all(torch.equal(x.last_state[k], y.last_state[k]) for k in x.last_state) for x, y in zip(a, b, strict=True)]
    assert same == [True, False]


def test_kept_epoch_is_what_a_shorter_training_ends_with():
    long = train_small(epochs=3, kept=((1, 2),))
    short = train_small(epochs=2)
    assert long[0].kept == {} and list(long[1].kept) == ["epoch2"]
    for key, value in short[1].last_state.items():
        assert torch.equal(long[1].kept["epoch2"][key], value)
    with pytest.raises(UserError, match="cannot keep epoch 4 of member 1"):
        train_small(epochs=3, kept=((1, 4),))


@pytest.mark.parametrize("device, ranks, parts", [("cpu", 1, 8), ("cpu", 4, 8), ("cuda", 1, 1), ("cuda", 4, 4),
                                                  ("cuda", 9, 8)])  # fmt: skip
def test_a_gpu_gets_one_part_of_a_batch_and_a_cpu_those_that_make_the_same_bits(device, ranks, parts):
    settings = training.TrainingSettings((), parts=8)
    assert training._for_device(settings, torch.device(device), SimpleNamespace(world=ranks)).parts == parts


@pytest.mark.parametrize("options", [{}, {"resampling": "bootstrap"}, {"sequential": True}])
def test_a_recorded_step_trains_as_the_loop_does(monkeypatch, options):
    """Its weights in the place of repeated rows change nothing but the rounding; batches unseen are the loop's."""
    members = [member("a", epochs=3), member("b", epochs=2, min_time=0.3), member("c", min_time=0.97)]
    plain = train(members, batch_size=16, **options)
    monkeypatch.setattr(training, "_records", lambda device, parts: True)
    steps, call = [], training.RecordedStep.__call__
    monkeypatch.setattr(training.RecordedStep, "__call__", lambda self, b: steps.append(call(self, b)) or steps[-1])
    recorded = train(members, batch_size=16, **options)
    assert True in steps and (False in steps) != ("sequential" in options)  # alone, a member sees every image
    for one, other in zip(plain, recorded, strict=True):
        for row, again in zip(one.history, other.history, strict=True):
            assert row == pytest.approx(again, abs=2e-4, nan_ok=True)
        for name, value in one.last_state.items():
            assert torch.allclose(value, other.last_state[name], atol=2e-4), name
