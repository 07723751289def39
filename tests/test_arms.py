"""Arms whose rule or change is a function of the notebook's own, at another's strength, and controls."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from test_jobs import sampling, store, tiny_networks, trained, training  # noqa: F401

from dgutils import datasets
from dgutils.discriminator import RULES, raw_logits_as_probabilities
from dgutils.errors import UserError
from dgutils.noise import sigma_to_vp_time
from dgutils.pipeline import cells, jobs


def double(logits, sigma):
    return 2 * logits.mean(dim=0)


def below(logits, sigma, low):
    return torch.where(sigma < low, logits.mean(dim=0), 0 * logits.mean(dim=0))


def rolled(guidance, sigma):
    return guidance.roll(1, dims=0)


def of(store, guide):  # noqa: F811
    return jobs.ImageSet(store, sampling(), 16, 100, guide)


def test_a_rule_of_ones_own_is_used_and_is_its_source(store, trained):  # noqa: F811
    one = jobs.Guidance(trained, (0, 1))
    same, other = of(store, replace(one, rule=double, weight_1st_order=1.0)), of(store, one)
    assert np.abs(same.images.astype(int) - other.images).max() <= 1 and same.digest != other.digest
    parts = [of(store, replace(one, rule=partial(below, low=low))) for low in (0.5, 5.0, 1e3)]
    assert len({part.digest for part in parts}) == 3
    assert np.array_equal(parts[2].images, other.images) and not np.array_equal(parts[0].images, other.images)


@pytest.mark.parametrize("rule", [partial(below, 3), (lambda low: lambda logits, sigma: low * logits[0])(3)])
def test_what_would_be_no_part_of_an_arms_identity_is_refused(store, trained, rule):  # noqa: F811
    with pytest.raises(UserError, match="functools.partial"):
        of(store, jobs.Guidance(trained, (0,), rule=rule))


def test_a_rule_written_in_a_cell_has_the_source_that_it_has_in_a_kernel(tmp_path, monkeypatch):
    import nbformat
    from nbformat.v4 import new_code_cell, new_notebook

    rule = "def mine(logits, sigma):\n    return logits.mean(dim=0)\n"
    book = new_notebook(cells=[
        new_code_cell("profile: str = 'smoke'", metadata={"tags": ["parameters"]}),
        new_code_cell(f"{rule}\nexperiment = mine", metadata={"tags": ["setup"]})])  # fmt: skip
    nbformat.write(book, tmp_path / "07_mine.ipynb")
    found = cells.experiment_of(tmp_path / "07_mine.ipynb", {})
    assert jobs.less_defaults(jobs.Guidance(None, (0,), rule=found))["rule"] == rule


def test_a_change_acts_on_what_guidance_adds(store, trained):  # noqa: F811
    one = jobs.Guidance(trained, (0,))
    x, sigma = torch.randn(3, 1, 32, 32, dtype=torch.float64), torch.full((3,), 2.0, dtype=torch.float64)
    terms = [jobs.make_denoiser(sampling(), guide).guidance(x, sigma, 0, 1)
             for guide in (one, replace(one, change=rolled))]
    assert torch.equal(terms[1], terms[0].roll(1, dims=0)) and not torch.equal(*terms)
    assert of(store, one).digest != of(store, replace(one, change=rolled)).digest


@pytest.mark.parametrize("rule", ["mean_probability", raw_logits_as_probabilities.__name__, double])
def test_equal_strength_is_equal_norm_at_every_step(trained, rule):  # noqa: F811
    one = jobs.Guidance(trained, (0,), weight_1st_order=3.0)
    guide = jobs.equalised(sampling(), jobs.Guidance(trained, (0, 1), rule, equal_to=one))
    assert guide.equal_to is None and len(guide.weight_1st_order) == sampling().num_steps
    norms = {}
    for name, which in (("one", one), ("equal", guide)):
        plain, guided, norms[name] = jobs.make_denoiser(sampling()), jobs.make_denoiser(sampling(), which), []

        def watched(x, sigma, step, order, plain=plain, guided=guided, said=norms[name]):
            if order == 1:
                said.append(guided.guidance(x, sigma, step, order).flatten(1).norm(dim=1).mean().item())
            return plain(x, sigma, step, order)

        jobs.draw(sampling(), watched, jobs.PILOT)
    guided = [bool(weight) for weight in guide.weight_1st_order]
    assert any(guided) and np.allclose(np.array(norms["equal"])[guided], np.array(norms["one"])[guided], rtol=1e-4)


def test_equal_strength_is_part_of_an_arms_identity(store, trained):  # noqa: F811
    six = jobs.Guidance(trained, (0, 1))
    arms = [of(store, guide) for guide in (
        six, replace(six, equal_to=jobs.Guidance(trained, (0,))),
        replace(six, equal_to=jobs.Guidance(trained, (0,), weight_1st_order=1.0)))]
    assert len({arm.digest for arm in arms}) == 3
    assert not np.array_equal(arms[1].images, arms[2].images)


def test_shuffled_labels_keep_images_and_balance_and_say_nothing(store, trained):  # noqa: F811
    control = jobs.Trained(store, training(num_real=400, shuffled=True), jobs.ImageSet(store, sampling(), 400))
    honest = jobs.Trained(store, training(num_real=400), jobs.ImageSet(store, sampling(), 400))
    for ours, theirs in zip(control.splits, honest.splits, strict=True):
        assert np.array_equal(ours.images, theirs.images) and sum(ours.labels) == sum(theirs.labels)
        assert abs(np.corrcoef(ours.labels, theirs.labels)[0, 1]) < 0.35
    assert control.digest != honest.digest


def test_a_training_has_the_real_images_that_it_draws(store, trained):  # noqa: F811
    fakes = jobs.ImageSet(store, sampling(), 40)
    first, others = [jobs.Trained(store, training(real_seed=seed), fakes) for seed in (None, 1)], []
    every = datasets.load_dataset("fashion_mnist", "train")[0]
    for which in first:
        real = np.concatenate([split.images[split.labels == 1] for split in which.splits])
        assert len(np.unique(real, axis=0)) == 40
        others.append({image.tobytes() for image in real})
    assert others[0] == {image.tobytes() for image in every[:40]} and not others[0] & others[1]


def test_every_named_rule_is_as_it_was(trained):  # noqa: F811
    x, sigma = torch.randn(2, 1, 32, 32), torch.full((2,), 1.0, dtype=torch.float64)
    for name, rule in RULES.items():
        ensemble = trained.ensemble((0, 1), name)
        logits = ensemble.logits(x, sigma_to_vp_time(sigma))
        assert torch.equal(ensemble.log_density_ratio(x, sigma_to_vp_time(sigma)), rule(logits))


def test_a_temperature_undoes_what_makes_a_member_too_sure(store, trained, monkeypatch):  # noqa: F811
    """Logits five times as large have five times the temperature; at it, both are the same discriminator."""
    calm = trained.temperature(0, "last")
    x, time = torch.randn(4, 1, 32, 32), torch.tensor(0.3, dtype=torch.float64)
    found = [trained.ensemble([0], calibrated=True).logits(x, time)]
    head = trained.head

    def surer(member, state):
        sure = head(member, state)
        sure.out[-1].c_proj.weight.data *= 5
        sure.out[-1].c_proj.bias.data *= 5
        return sure

    monkeypatch.setattr(trained, "head", surer)
    assert trained.temperature(0, "last") == pytest.approx(5 * calm, rel=1e-2)
    found.append(trained.ensemble([0], calibrated=True).logits(x, time))
    assert torch.allclose(*found, rtol=1e-2) and trained.ensemble([0]).logits(x, time).abs().max() > 0
    guides = [jobs.Guidance(trained, (0,), calibrated=how) for how in (False, True)]
    assert of(store, guides[0]).digest != of(store, guides[1]).digest
