"""Do the claims of the default run hold for other training seeds? A check that is recorded, and no test.

    python tests/other_seeds.py [--profile quick] [--seeds 1 2 3]

Prints a Markdown table: one discriminator, the six and the raw-logit fault against unguided sampling, from the same
image seeds. Only discriminators and guided images are made anew, under runs/<profile>/store.
"""

import argparse

from dgutils.pipeline.experiment import Experiment, six_discriminators

RULES = {"one discriminator": ([0], "mean_logit"), "six, mean probability": (range(6), "mean_probability"),
         "six, raw logits": (range(6), "raw_logits_as_probabilities")}  # fmt: skip


def rows(profile: str, seed: int) -> list[str]:
    """A line for each arm: change of KID x 1000, its interval, and the share of the gap to real images, by space."""
    experiment = Experiment({"profile": profile, "training_seed": seed})
    six, plain, lines = six_discriminators(experiment), experiment.images("unguided sampling"), []
    for name, (members, rule) in RULES.items():
        arm, cells = experiment.images(f"{name}, seed {seed}", experiment.guide(six, members, rule)), []
        for space in experiment.parameters.feature_spaces:
            base, real = experiment.scores(plain, space), experiment.scores(experiment.floor, space)
            change = experiment.scores(arm, space).minus(base, "kid")
            share = -change.value / (base.kid.value - real.kid.value)
            cells += [f"{1000 * change.value:.1f} [{1000 * change.low:.1f}, {1000 * change.high:.1f}]", f"{share:.0%}"]
        lines.append(f"| {seed} | {name} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--profile", default="quick")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    args = parser.parse_args()
    spaces = Experiment({"profile": args.profile}).parameters.feature_spaces
    heads = [head for space in spaces for head in (f"KID x 1000, {space}", "share of the gap")]
    print(f"| training seed | arm | {' | '.join(heads)} |\n|{'---|' * (2 + len(heads))}", flush=True)
    for seed in args.seeds:
        print("\n".join(rows(args.profile, seed)), flush=True)


if __name__ == "__main__":
    main()
