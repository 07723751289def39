"""python -m dgutils: the command line behind the Makefile."""

import sys

from dgutils.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
