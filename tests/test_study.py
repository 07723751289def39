"""The arms that notebooks compare, and the plan that counts what they would cost: nothing is computed here."""

import pytest

from dgutils.cli import plan
from dgutils.errors import UserError
from dgutils.pipeline import jobs, notebooks
from dgutils.pipeline.study import FAULTS, VARIANTS, Study


def dry(profile, monkeypatch, tmp_path, **changes) -> tuple[Study, dict]:
    """A profile's study on a store that makes nothing, in a folder of the test's own, and its parameters."""
    parameters = notebooks.every_parameter(profile) | changes
    monkeypatch.setattr(jobs, "runs_dir", lambda profile: tmp_path / profile)
    monkeypatch.setenv("DGUTILS_WEIGHTS", str(tmp_path / "weights"))
    study = Study.from_parameters(parameters)
    study.__dict__["store"] = jobs.open_store(profile, dry=True)
    return study, parameters


@pytest.mark.parametrize("profile", ["quick", "paper", "study"])
def test_all_arms_of_a_comparison_have_the_same_seeds(profile, monkeypatch, tmp_path):
    study, _ = dry(profile, monkeypatch, tmp_path)
    for arms in (study.evaluation_arms(), study.published_arms(), study.claim_arms(), study.ensemble_arms()):
        assert {(arm.seeds, arm.n) for name, arm in arms.items() if name != "floor"} <= {
            (range(study.eval_seed, study.eval_seed + study.num_eval), study.num_eval)}
    assert not set(study.fakes.seeds) & set(study.evaluation_arms()["unguided"].seeds)


def test_an_arm_of_two_notebooks_is_one_artifact(monkeypatch, tmp_path):
    study, _ = dry("quick", monkeypatch, tmp_path)
    evaluation, claims, members = study.evaluation_arms(), study.claim_arms(), study.ensemble_arms()
    assert evaluation["paper"].digest == claims["paper"].digest == members["paper"].digest
    assert evaluation["ensemble"].digest == members["mean_probability"].digest
    assert claims["fault"].digest == members["raw_all"].digest != members["raw_one"].digest
    assert len({arm.digest for arm in members.values()}) == len(members)


def test_seed_blocks_are_disjoint_and_apart_from_the_fake_set(monkeypatch, tmp_path):
    study, _ = dry("paper", monkeypatch, tmp_path)
    for arms in study.seed_block_arms().values():
        assert [arm.seeds for arm in arms] == [range(0, 50000), range(50000, 100000), range(100000, 150000)]
    assert study.fakes.seeds.start >= 150000 and study.reference.n == 50000  # EDM's protocol
    assert study.reference.split == "train"


def test_profiles_that_stand_on_another_differ_only_in_what_they_say():
    paper, study, rehearsal = (notebooks.every_parameter(name) for name in ("paper", "study", "rehearsal"))
    assert rehearsal["watermark"] == "rehearsal" and not paper["watermark"]
    networks = ("score_network", "feature_extractor", "feature_spaces", "published_discriminator",
                "conditional_network", "conditional_discriminator", "head_width", "head_blocks", "head_channels",
                "log_ratio", "dg_weight_1st_order", "boosting", "precision", "dataset")  # fmt: skip
    assert all(rehearsal[name] == paper[name] for name in networks)
    assert (paper["num_steps"], paper["discriminator_batch_size"], paper["boosting"]) == (18, 128, "none")
    assert (study["num_steps"], study["discriminator_batch_size"], study["held_out_every"]) == (35, 64, 10)
    assert study["boosting"] == "released" and study["sequential"]
    assert paper["epochs"] == study["epochs"] == [60, 40, 40, 40, 40, 200]


def test_floor_is_other_images_than_the_reference(monkeypatch, tmp_path):
    study, _ = dry("quick", monkeypatch, tmp_path)
    assert (study.reference.split, study.floor.split) == ("test", "test")
    assert study.floor.start == study.reference.start + study.reference.n
    study, _ = dry("paper", monkeypatch, tmp_path)
    assert (study.floor.split, study.floor.n, study.floor.start) == ("test", 10000, 0)


# --- the ladder of faults

AS_RUN = {"num_steps": 35, "boosting": "released", "discriminator_batch_size": 64}


def differences(a, b) -> set[str]:
    """In which of the settings of FAULTS two arms differ, read from their identities."""
    first, second = (arm.rows.artifact.identity for arm in (a, b))
    guidance = [identity["config"]["guidance"] for identity in (first, second)]
    found = {key for key in ("rule", "members", "state", "boosting") if guidance[0][key] != guidance[1][key]}
    found |= {"num_steps"} & {key for key in first["config"] if first["config"][key] != second["config"][key]}
    return found | {"training"} if first["inputs"] != second["inputs"] else found


SETTING = {"raw_logits": "rule", "sequential": "training", "wrong_file": "members", "last_epoch": "state",
           "boosting": "boosting", "steps": "num_steps", "batch_size": "training"}  # fmt: skip


def test_each_rung_mends_one_fault_and_each_single_fault_adds_one(monkeypatch, tmp_path):
    study, _ = dry("quick", monkeypatch, tmp_path, ladder=list(FAULTS), as_run=AS_RUN)
    arms = study.ladder_arms()
    down = [arms[name] for name in arms if not name.startswith("only_")]
    assert len(down) == len(FAULTS) + 1
    for fault, above, below in zip(FAULTS, down, down[1:], strict=False):
        assert differences(above, below) == {SETTING[fault]}, fault
    for fault in FAULTS:
        assert differences(arms[f"only_{fault}"], arms["correct"]) == {SETTING[fault]}, fault
    assert arms["without_boosting"].digest == arms["only_batch_size"].digest  # the last rung above the correct ensemble
    assert study.faulty_arm([], "x").digest == study.arm(
        "x", study.guidance(study.everyone, "mean_probability", state="best")).digest


def test_repeats_are_independent_trainings_on_the_same_image_seeds(monkeypatch, tmp_path):
    study, _ = dry("quick", monkeypatch, tmp_path, ladder=list(FAULTS), as_run=AS_RUN, repeats=3, num_key=250)
    arms = study.repeat_arms()
    assert all(len({arm.digest for arm in by_training}) == 3 for by_training in arms.values())
    assert {(arm.n, arm.seeds.start) for by_training in arms.values() for arm in by_training} == {
        (250, study.eval_seed)}
    assert arms["correct"][0].rows.artifact.digest == study.ladder_arms()["correct"].rows.artifact.digest
    assert arms["as_run"][0].rows.artifact.digest == study.ladder_arms()["as_run"].rows.artifact.digest


def test_variants_differ(monkeypatch, tmp_path):
    study, _ = dry("quick", monkeypatch, tmp_path, variants=list(VARIANTS))
    assert len({arm.digest for arm in study.variant_arms().values()}) == len(VARIANTS)


@pytest.mark.parametrize("changes, message", [
    (dict(ladder=["raw"]), "unknown fault 'raw': choose from steps, raw_logits, "),
    (dict(variants=["boost"]), "unknown variant 'boost': choose from bootstrap, "),
    (dict(repeats=-1), "repeats is -1: at least 1"),
    (dict(num_eval=0), "num_eval is 0: at least 1"),
    (dict(boosting="sometimes"), "unknown boosting 'sometimes'")])
def test_what_is_impossible_is_said_before_anything_is_made(changes, message):
    with pytest.raises(UserError, match=message):
        Study.from_parameters(notebooks.every_parameter("quick") | changes)


# --- the plan


@pytest.fixture
def small(monkeypatch, tmp_path):
    """The plan's steps of quick with round numbers, and its parameters."""
    _, parameters = dry("quick", monkeypatch, tmp_path, num_eval=100, shard_size=50, batch_size=50, num_fake=200,
                        num_sweep=50, num_steps=10, seed_blocks=2)  # fmt: skip
    return plan.steps(parameters), parameters


def test_plan_counts_what_the_arms_cost(small, tmp_path):
    steps, parameters = small
    by_label = {step.label: step for step in steps}
    assert by_label["fake set"].score == 200 * 19  # 10 Heun steps are 19 evaluations
    assert by_label["unguided sampling"].score == 100 * 19 and by_label["unguided sampling"].gradient == 0
    one, six = by_label["guidance by Paper"], by_label["guidance by the ensemble"]
    assert one.gradient == six.gradients > 0 == one.gradients == six.gradient
    assert one.gradient % 100 == 0 and one.gradient <= 100 * 10
    assert by_label["DDPM's ancestral sampler"].score == 100 * parameters["ancestral_steps"]
    assert by_label["paper, block 2"].n == 100
    training = by_label["training: six discriminators, Paper 5, D1 3, D2 3, D3 3, D4 3, D5 16 epochs"]
    assert training.train == 2 * 200 * 8 // 10 * (5 + 3 + 3 + 3 + 3 + 16)
    assert all(step.missing for step in steps) and not list(tmp_path.glob("quick/**/*.npy"))


def test_plan_counts_the_trainings_of_the_ladder_and_the_worse_images(monkeypatch, tmp_path):
    _, parameters = dry("quick", monkeypatch, tmp_path, ladder=list(FAULTS), as_run=AS_RUN, repeats=3,
                        variants=list(VARIANTS))  # fmt: skip
    labels = [step.label for step in plan.steps(parameters)]
    trainings = [label for label in labels if label.startswith("training: ")]
    # correct and as run, three seeds each; two faults; a sweep; bootstrap, disjoint, long, full, worse
    assert len(trainings) == len(set(trainings)) == 3 + 3 + 2 + 1 + 5
    assert "fake set of 6 steps" in labels and "fake set" in labels


def test_plan_lists_each_image_once(small):
    steps, _ = small
    assert len({step.label for step in steps if step.score}) == sum(bool(step.score) for step in steps)
    assert not any(step.label == "Paper, weight 2" for step in steps)  # the first 50 images of "guidance by Paper"
    assert next(step for step in steps if step.label == "guidance by Paper").features == {
        space: 150 for space in ("fashion-mnist-adm", "efficientnet-lite0@128")}  # of 100, and of those 50


def test_plan_keeps_the_state_of_unfinished_trainings(monkeypatch, tmp_path):
    study, parameters = dry("quick", monkeypatch, tmp_path)
    name = study.trained.artifact.name
    jobs.open_store("quick").save_partial(name, b"ten epochs")
    plan.steps(parameters)
    assert jobs.open_store("quick").load_partial(name) == b"ten epochs"


def test_plan_of_the_published_profile_needs_no_file(monkeypatch, tmp_path, capsys):
    _, parameters = dry("paper", monkeypatch, tmp_path)
    steps = plan.steps(parameters)
    assert sum(step.n for step in steps if step.score) > 500_000
    assert {step.label for step in steps} >= {"guidance by the published discriminator", "class-conditional, guided"}
    assert not (tmp_path / "weights").exists() and not (tmp_path / "paper").exists()
