"""python -m dgutils: the command line behind the Makefile."""

import sys

from dgutils.errors import UserError
from dgutils.paths import settle


def main(arguments=None) -> int:
    """Run a command of `cli.main`; before the packages are installed, the doctor alone, which says which lack."""
    try:
        from dgutils.cli.main import main
    except ModuleNotFoundError as error:
        given = sys.argv[1:] if arguments is None else arguments
        if given[:1] == ["doctor"]:
            from dgutils.cli.doctor import run

            return run(given[-1] if given[1:] else "quick")
        print(f"dgutils: package {error.name} is missing: `make` with any target installs all (make help)",
              file=sys.stderr)  # fmt: skip
        return 2
    return main(arguments)


if __name__ == "__main__":
    try:
        if sys.version_info >= (3, 11):  # noqa: UP036 (else the doctor says that it is too old)
            settle()
        status = main()
    except UserError as error:
        print(f"dgutils: {error}", file=sys.stderr)
        status = 2
    sys.exit(status)
