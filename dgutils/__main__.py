"""Discriminator guidance, reproduced: the command line behind the Makefile."""

import argparse
import sys
from pathlib import Path

from .errors import UserError
from .paths import repo_root, results_dir


def _reproduce(args):
    from .notebooks import parse_override, run_profile
    from .results import print_summary

    run_profile(args.profile, args.only, dict(parse_override(text) for text in args.set))
    if args.only is None:
        print_summary(args.profile)


def _report(args):
    from .results import write_latex

    # The committed study is the report's; a clone that has not got it yet reports what it ran itself.
    complete = [p for p in ("cifar10", "quick") if (results_dir(p) / "06.json").is_file()]
    profile = args.profile or (complete or ["quick"])[0]
    print(f"wrote {write_latex(profile).relative_to(repo_root())} from the results of profile {profile}")


def _train(args):
    from .pretrain import export, train_network

    out = Path(args.out) if args.out else repo_root() / "runs" / "networks"
    path = export(args.name, out) if args.export else train_network(args.name, out, args.threads)
    print(f"wrote {path} and its model card; to ship them, move both to dgutils/assets")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m dgutils", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    sub = commands.add_parser("reproduce", help="run the notebooks of a profile and print the result table")
    sub.add_argument("--profile", default="quick", help="notebooks/profiles/PROFILE.yaml [quick]")
    sub.add_argument("--only", nargs="+", metavar="NN", help="only the notebooks whose names begin so")
    sub.add_argument("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help="change a parameter")
    sub.set_defaults(run=_reproduce)
    sub = commands.add_parser("report", help="write the numbers and tables that report/main.tex reads")
    sub.add_argument("--profile", help="whose results [cifar10 if there are any, else quick]")
    sub.set_defaults(run=_report)
    for command, what in (("train-score", "score network"), ("train-extractor", "feature extractor")):
        sub = commands.add_parser(command, help=f"train the {what} of a recipe in dgutils/assets; resumes")
        sub.add_argument("name", help="the recipe: dgutils/assets/NAME.yaml")
        sub.add_argument("--out", help="folder of checkpoint and result [runs/networks]")
        sub.add_argument("--threads", type=int, help="CPU threads [all]")
        sub.add_argument("--export", action="store_true", help="only write the weights of the checkpoint so far")
        sub.set_defaults(run=_train)
    return parser


def main(argv=None) -> int:
    """Run a command; a problem that the user can mend is one line on stderr and exit status 2."""
    args = _parser().parse_args(argv)
    try:
        args.run(args)
    except UserError as error:
        print(f"dgutils: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("dgutils: stopped; the same command goes on where it was", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
