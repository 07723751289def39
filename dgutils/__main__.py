"""The command line: `python -m dgutils COMMAND`."""

import argparse
import sys
from pathlib import Path

from .errors import UserError


def _train(args):
    from .paths import repo_root
    from .pretrain import export, train_network

    out = Path(args.out) if args.out else repo_root() / "runs" / "networks"
    path = export(args.name, out) if args.export else train_network(args.name, out, args.threads)
    print(f"wrote {path} and its card {path.with_suffix('.json').name}; to ship them, move both to dgutils/assets")


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="dgutils", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for command, what in (("train-score", "score network"), ("train-extractor", "feature extractor")):
        sub = commands.add_parser(command, help=f"train the {what} of a recipe in dgutils/assets; resumes")
        sub.add_argument("name", help="the recipe: dgutils/assets/NAME.yaml")
        sub.add_argument("--out", help="folder of checkpoint and result [runs/networks]")
        sub.add_argument("--threads", type=int, help="CPU threads [all]")
        sub.add_argument("--export", action="store_true", help="only write the weights of the checkpoint so far")
        sub.set_defaults(run=_train)
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except UserError as error:
        print(f"dgutils: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
