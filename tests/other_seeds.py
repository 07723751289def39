"""Do the claims of the default run hold for other training seeds, and other image seeds? Recorded, and no test.

    python tests/other_seeds.py [--profile quick] [--seeds 1 2 3]
    python tests/other_seeds.py --weights 2/2 3/3 4/4

Prints a Markdown table: one discriminator, the six and the raw-logit fault against unguided sampling, from the same
image seeds; or the shipped head alone, at these weights of predictor and corrector, on 400 images of the pilot's seeds,
which no arm has. Only discriminators and guided images are made anew, under runs/<profile>/store.
"""

import argparse

from dgutils.pipeline import jobs
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


def weighted(profile: str, weights: str) -> str:
    """A line: level, change and share of the gap at "first/second" order weights, by space; "0/0" is unguided."""
    experiment, cells = Experiment({"profile": profile}), []
    p, (first, second) = experiment.parameters, map(float, weights.split("/"))
    shipped = jobs.Published(p.feature_extractor, (p.head_start,))

    def images(w1, w2):
        guide = experiment.guide(shipped, weight_1st_order=w1, weight_2nd_order=w2) if w1 or w2 else None
        return jobs.ImageSet(experiment.store, experiment.sampling(), 400, jobs.PILOT.start, guide, f"pilot, {w1}/{w2}")

    for space in p.feature_spaces:
        scores, plain = (experiment.scores(images(*pair), space) for pair in ((first, second), (0, 0)))
        change = scores.minus(plain, "kid")
        cells += [f"{1000 * scores.kid.value:.1f}", f"{1000 * change.value:.1f} [{1000 * change.low:.1f}, "
                  f"{1000 * change.high:.1f}]", f"{-change.value / plain.kid.value:.0%}"]  # fmt: skip
    return f"| {weights} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--profile", default="quick")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--weights", nargs="+")
    args = parser.parse_args()
    spaces = Experiment({"profile": args.profile}).parameters.feature_spaces
    if args.weights:
        heads = [head for space in spaces for head in (f"KID x 1000, {space}", "change", "share of the gap")]
        print(f"| weights | {' | '.join(heads)} |\n|{'---|' * (1 + len(heads))}")
        return print("\n".join(weighted(args.profile, weights) for weights in ["0/0", *args.weights]))
    heads = [head for space in spaces for head in (f"KID x 1000, {space}", "share of the gap")]
    print(f"| training seed | arm | {' | '.join(heads)} |\n|{'---|' * (2 + len(heads))}", flush=True)
    for seed in args.seeds:
        print("\n".join(rows(args.profile, seed)), flush=True)


if __name__ == "__main__":
    main()
