"""What the notebooks declare at each profile, and the plan that counts what it costs: nothing is computed here."""

from dataclasses import replace

import pytest

from dgutils import paths
from dgutils.cli import plan
from dgutils.errors import UserError
from dgutils.pipeline import cells, jobs, parameters
from dgutils.pipeline.experiment import FAULTS, Experiment, fake_set, faulty_ensemble, key_arms, six_discriminators
from dgutils.pipeline.work import Declared, needed

AS_RUN = {"num_steps": 35, "boosting": "released", "discriminator_batch_size": 64}


@pytest.fixture(autouse=True)
def empty_clone(monkeypatch, tmp_path):
    """Stores, kept scores and published weights are in a folder of the test's own."""
    for function in ("runs_dir", "results_dir"):
        monkeypatch.setattr(jobs, function, lambda profile, function=function: tmp_path / function / profile)
    monkeypatch.setenv("DGUTILS_WEIGHTS", str(tmp_path / "weights"))


def experiment(profile="quick", **changes) -> Experiment:
    return Experiment({"profile": profile} | changes)


def arms(number: str, profile="quick", **changes) -> list[dict]:
    """What one notebook declares to be scored: name -> arm, a dict for each call."""
    found, declare = [], Experiment.declare

    def noted(self, arms, spaces=None, reference=None):
        declare(self, arms, spaces, reference)
        found.append(arms)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Experiment, "declare", noted)
        (source,) = cells.sources(number)
        cells.experiment_of(source, {"profile": profile} | changes)
    return found


@pytest.mark.parametrize("profile", ["quick", "paper", "study"])
def test_all_arms_of_a_comparison_have_the_same_seeds(profile):
    p = parameters.load(profile)
    for number in ("04", "05", "06"):
        scored = [arm for name, arm in arms(number, profile)[0].items() if name != "floor"]
        assert {(arm.seeds, arm.n) for arm in scored} == {(range(p.eval_seed, p.eval_seed + p.num_eval), p.num_eval)}
    assert not set(fake_set(experiment(profile)).seeds) & set(scored[0].seeds)


def test_an_arm_of_two_notebooks_is_one_artifact():
    evaluation, claims, members = (arms(number)[0] for number in ("04", "05", "06"))
    assert evaluation["paper"].digest == claims["paper"].digest == members["paper"].digest
    assert evaluation["ensemble"].digest == members["mean_probability"].digest
    assert claims["fault"].digest == members["raw_all"].digest != members["raw_one"].digest
    assert len({arm.digest for arm in members.values()}) == len(members)


def test_seed_blocks_are_disjoint_and_apart_from_the_fake_set():
    blocks = [found for found in arms("04", "paper") if isinstance(found.get("paper"), list)]
    assert len(blocks) == 1 and blocks[0].keys() == {"unguided", "paper", "authors"}
    for sets in blocks[0].values():
        assert [arm.seeds for arm in sets] == [range(0, 50000), range(50000, 100000), range(100000, 150000)]
    paper = experiment("paper")
    assert fake_set(paper).seeds.start >= 150000 and paper.reference.n == 50000  # EDM's protocol
    assert paper.reference.split == "train"


def test_floor_is_other_images_than_the_reference():
    quick, paper = experiment(), experiment("paper")
    assert (quick.reference.split, quick.floor.split) == ("test", "test")
    assert quick.floor.start == quick.reference.start + quick.reference.n
    assert (paper.floor.split, paper.floor.n, paper.floor.start) == ("test", 10000, 0)
    assert quick.real("train").n == quick.reference.n


def test_what_changes_a_step_is_in_its_identity_and_what_is_at_its_default_is_not():
    sampling = jobs.Sampling("fashion-mnist-edm")
    assert jobs.less_defaults(sampling) == {"score_network": "fashion-mnist-edm", "precision": sampling.precision}
    assert jobs.less_defaults(replace(sampling, rho=5.0)).keys() == {"score_network", "precision", "rho"}
    guide = experiment().guide(six_discriminators(experiment()))
    identity = experiment().images("guided", guide).rows.artifact.identity
    assert identity["config"].keys() == {"score_network", "num_steps", "sigma_min", "batch_size", "shard_size",
                                         "precision", "guidance"}  # fmt: skip
    assert identity["config"]["guidance"].keys() == {"members", "weight_1st_order", "weight_2nd_order"}


@pytest.mark.parametrize("changes, message", [
    (dict(num_eval=0), "notebook 04: num_eval is 0: input should be greater than or equal to 1"),
    (dict(boosting="sometimes"), "boosting is 'sometimes'"),
    (dict(head_channels=7), "num_head_channels"),
    (dict(profile="quik"), "unknown profile quik: there are after, cifar10, "),
])  # fmt: skip
def test_what_is_impossible_is_said_before_anything_is_made(changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        Experiment(changes, "04")
    assert not list(tmp_path.iterdir())


def test_none_and_what_is_no_parameter_leave_the_profile_as_it_is():
    assert experiment(num_eval=None, other=7, six=None).parameters == parameters.load("quick")
    assert experiment(num_eval=8).parameters == parameters.load("quick", {"num_eval": 8})


# --- the ladder of faults


def differences(a, b) -> set[str]:
    """In which of the settings of FAULTS two arms differ."""
    found = {key for key in ("rule", "members", "state", "boosting") if getattr(a.guide, key) != getattr(b.guide, key)}
    found |= {"num_steps"} if a.sampling.num_steps != b.sampling.num_steps else set()
    assert a.sampling == replace(b.sampling, num_steps=a.sampling.num_steps)
    return found | {"training"} if a.guide.discriminators.digest != b.guide.discriminators.digest else found


SETTING = {"raw_logits": "rule", "sequential": "training", "wrong_file": "members", "last_epoch": "state",
           "boosting": "boosting", "steps": "num_steps", "batch_size": "training"}  # fmt: skip


def test_each_rung_mends_one_fault_and_each_single_fault_adds_one():
    rungs = next(found for found in arms("06", ladder=list(FAULTS), as_run=AS_RUN) if "as_run" in found)
    down = [rungs[name] for name in rungs if not name.startswith("only_")]
    assert len(down) == len(FAULTS) + 1
    for fault, above, below in zip(FAULTS, down, down[1:], strict=False):
        assert differences(above, below) == {SETTING[fault]}, fault
    for fault in FAULTS:
        assert differences(rungs[f"only_{fault}"], rungs["correct"]) == {SETTING[fault]}, fault
    assert rungs["without_boosting"].digest == rungs["only_batch_size"].digest  # the last rung above the correct one
    one = experiment(ladder=list(FAULTS), as_run=AS_RUN)
    guide = one.guide(six_discriminators(one), range(6), "mean_probability", state="best")
    assert faulty_ensemble(one, [], "x").digest == one.images("x", guide).digest == rungs["correct"].digest


def test_repeats_are_independent_trainings_on_the_same_image_seeds():
    one = experiment(ladder=list(FAULTS), as_run=AS_RUN, repeats=3, num_key=250)
    found = key_arms(one)
    assert all(len({arm.digest for arm in by_training}) == 3 for by_training in found.values())
    assert {(arm.n, arm.seeds.start) for by_training in found.values() for arm in by_training} == {
        (250, one.parameters.eval_seed)}
    for name, faults in (("correct", []), ("as_run", list(FAULTS))):
        assert found[name][0].rows.artifact.digest == faulty_ensemble(one, faults, "x").rows.artifact.digest


def test_variants_differ_and_a_profile_without_has_none():
    every = parameters.load("cifar10").variants
    (found,) = [found for found in arms("06", "cifar10") if every[0] in found]
    assert list(found) == every and len({arm.digest for arm in found.values()}) == len(every) == 11
    assert not any({"as_run", "bootstrap"} & found.keys() for found in arms("06"))


# --- what is needed, and the plan


def test_what_others_are_made_from_comes_first_and_what_is_not_needed_not_at_all():
    one = experiment()
    six = six_discriminators(one)
    arm = one.images("guided", one.guide(six))
    assert [item.digest for item in needed([arm, six])] == [six.fakes.digest, six.digest, arm.digest]
    assert needed([arm], lambda item: item.digest != six.digest) == [arm]
    assert needed([one.floor]) == []


def test_a_notebook_of_ones_own_is_planned_and_made_without_being_listed_anywhere():
    scored = {(score.images.label, score.space) for score in Declared("quick").scored}
    assert ("guidance by Paper, untrained", "efficientnet-lite0@128") in scored
    assert ("paper, block 1", "fashion-mnist-adm") not in scored  # the same images as "guidance by Paper"


@pytest.fixture
def small():
    """The plan's steps of quick with round numbers, and its parameters."""
    declared = Declared("quick", dict(num_eval=100, shard_size=50, batch_size=50, num_fake=200, num_sweep=50,
                                      num_steps=10, seed_blocks=2))  # fmt: skip
    return plan.steps(declared), declared.parameters


def test_plan_counts_what_the_arms_cost(small, tmp_path):
    steps, p = small
    by_label = {step.label: step for step in steps}
    assert by_label["fake set"].work["score"] == 200 * 19  # 10 Heun steps are 19 evaluations
    assert by_label["unguided sampling"].work == {"score": 100 * 19, "gradient": 0}
    one, six = by_label["guidance by Paper"], by_label["guidance by the ensemble"]
    assert one.work["gradient"] == six.work["gradients"] > 0 == one.work["gradients"] == six.work["gradient"]
    assert one.work["gradient"] % 100 == 0 and one.work["gradient"] <= 100 * 19
    assert by_label["DDPM's ancestral sampler"].work["score"] == 100 * p.ancestral_steps
    assert by_label["paper, block 2"].n == 100
    training = by_label["training: six discriminators, Paper 5, D1 3, D2 3, D3 3, D4 3, D5 16 epochs"]
    assert training.work["train"] == 2 * 200 * 8 // 10 * (5 + 3 + 3 + 3 + 3 + 16)
    assert not list(tmp_path.iterdir())


def test_plan_counts_the_trainings_of_the_ladder_and_the_worse_images():
    declared = Declared("quick", dict(ladder=list(FAULTS), as_run=AS_RUN, repeats=3,
                                      variants=parameters.load("cifar10").variants))  # fmt: skip
    labels = [step.label for step in plan.steps(declared)]
    trainings = [label for label in labels if label.startswith("training: ")]
    # correct and as run, three seeds each; two faults; a sweep; bootstrap, disjoint, long, full, worse
    assert len(trainings) == len(set(trainings)) == 3 + 3 + 2 + 1 + 5
    assert "fake set, num steps 6" in labels and "fake set" in labels


def test_plan_counts_likelihoods_once_where_there_are_to_be_some(small):
    assert not [step for step in small[0] if step.label.startswith("likelihood")]
    declared = Declared("quick", dict(num_likelihood=10, batch_size=5, shard_size=5))
    found = {step.label: step for step in plan.steps(declared) if step.label.startswith("likelihood")}
    assert found.keys() == {"likelihood: unguided", "likelihood: guidance by Paper"}  # notebook 05's are the same
    unguided, guided = found.values()
    assert unguided.work == {"score": 10 * (6 * 24 - 4), "gradient": 0} and guided.work["gradient"] == 10 * 140
    assert unguided.n == guided.n == 10


def test_plan_lists_each_image_once(small):
    steps, _ = small
    assert len({step.label for step in steps if step.work["score"]}) == sum(bool(step.work["score"]) for step in steps)
    assert not any(step.label == "Paper, weight 2" for step in steps)  # the first 50 images of "guidance by Paper"
    assert next(step for step in steps if step.label == "guidance by Paper").features == {
        space: 150 for space in ("fashion-mnist-adm", "efficientnet-lite0@128")}  # of 100, and of those 50


def test_plan_keeps_the_state_of_unfinished_trainings():
    name = six_discriminators(experiment()).artifact.name
    jobs.open_store("quick").save_partial(name, b"ten epochs")
    plan.steps(Declared("quick"))
    assert jobs.open_store("quick").load_partial(name) == b"ten epochs"


def test_plan_of_the_published_profile_needs_no_file(tmp_path):
    steps = plan.steps(Declared("paper"))
    assert sum(step.n for step in steps if step.work["score"]) > 500_000
    assert {step.label for step in steps} >= {"guidance by the published discriminator", "class-conditional, guided"}
    assert not list(tmp_path.iterdir())


def test_the_committed_scores_are_those_of_the_profile_by_the_network_that_drew_them(monkeypatch):
    """So the README says; a step whose identity changes would orphan them."""
    monkeypatch.setattr(jobs, "results_dir", paths.results_dir)
    declared = Declared("cifar10", {"score_network": "cifar10-edm-2m"})
    kept = declared.experiments[0].store.kept
    assert len(kept) > 100 and {score.artifact.digest for score in declared.scored} == kept.keys()


SECOND = {"repeats": 2, "num_fake": 40, "overfit_images": 20, "num_eval": 16, "num_key": 32, "strengths": [2.0, 4.0]}


def test_the_second_study_has_the_arms_of_its_plan_at_equal_seeds():
    (study,) = [arms for arms in arms("06", "second", **SECOND) if "six_papers.equal" in arms]
    assert {"one", "six_table.equal", "silence", "gain", "faulty", "shuffled.equal", "dealt", "cifar10-edm.plain",
            "cifar10-edm-2m.six", "world.as_run", "world.less_boosting", "world.plus_raw_logits",
            "overfitted_last"} <= study.keys()  # fmt: skip
    assert list(study)[:3] == ["one", "faulty", "correct"] and study["faulty.w2"][0].guide.weight_1st_order == 2.0
    assert not [name for name in study if "wrong_file" in name]  # it was never in the study's images
    starts = {arm.first_seed for name, arms in study.items() if name != "unguided" for arm in arms}
    assert starts == {1_000_000} and {len(arms) for name, arms in study.items() if name != "unguided"} == {2}
    assert all(arm.sampling.num_steps == (35 if name.startswith("world") else 18)
               for name, arms in study.items() for arm in arms)


def test_trainings_of_the_second_study_share_nothing_and_world_learns_from_what_it_guides():
    (study,) = [arms for arms in arms("06", "second", **SECOND) if "six_papers.equal" in arms]
    for name in ("one", "six_papers.equal", "world.right", "overfitted_last"):
        (first,), (other,) = (arm.sources for arm in study[name])
        assert not set(first.fakes.seeds) & set(other.fakes.seeds) and first.config.seed != other.config.seed
        assert first.config.real_seed != other.config.real_seed
    (world,) = study["world.as_run"][0].sources
    assert world.fakes.sampling.num_steps == 35 and world.config.batch_size == 64 and world.config.sequential
    (few,) = study["overfitted_last"][0].sources
    assert few.config.num_real == few.fakes.n == 20


def test_single_faults_of_the_studys_world_are_left_out_and_added_one_at_a_time():
    (study,) = [arms for arms in arms("06", "second", **SECOND) if "six_papers.equal" in arms]

    def guides(name):
        return study[f"world.{name}"][0].guide, study[f"world.{name}"][0].sources[0].config

    for fault in ("raw_logits", "sequential", "last_epoch", "boosting", "batch_size"):
        for mended, whole in ((guides(f"less_{fault}"), guides("as_run")), (guides("right"), guides(f"plus_{fault}"))):
            differ = {name for ours, theirs in zip(mended, whole, strict=True) for name in vars(ours)
                      if name not in ("discriminators", "ensemble") and getattr(ours, name) != getattr(theirs, name)}
            assert len(differ) == 1, (fault, differ)


def test_equal_strength_is_that_of_one_at_the_studys_weight():
    (study,) = [arms for arms in arms("06", "second", **SECOND) if "six_papers.equal" in arms]
    one = study["one"][0].guide
    for name in ("six_table.equal", "six_logits.equal", "three_best.equal", "six_papers.equal", "six_calibrated.equal",
                 "shuffled.equal"):
        to = study[name][0].guide.equal_to
        assert jobs.less_defaults(to, "discriminators") == jobs.less_defaults(one, "discriminators")
        assert to.discriminators.digest == one.discriminators.digest and one.weight_1st_order == 16.0


@pytest.mark.parametrize(("profile", "changes"), [("quick", {}), ("cifar10", {"sweep_weights": [1.0, 4.0]}),
                                                  ("quick", {"dg_weight_2nd_order": 1.5, "sweep_weights": [6.0]})])
def test_a_swept_weight_keeps_the_correctors_proportion_to_the_predictors(profile, changes):
    p, swept = parameters.load(profile, changes), {}
    for some in arms("05", profile, **changes):
        swept |= {float(w): arm.guide for w, arm in some.items()
                  if getattr(arm, "label", "").startswith("Paper, weight")}
    assert swept.keys() == {p.dg_weight_1st_order, *p.sweep_weights}
    for w, guide in swept.items():
        assert guide.weight_1st_order == w and p.dg_weight_1st_order > 0
        assert guide.weight_2nd_order == pytest.approx(w * p.dg_weight_2nd_order / p.dg_weight_1st_order)
