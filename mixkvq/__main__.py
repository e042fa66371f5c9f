"""``python -m mixkvq``: the command line; without arguments, what a bug report needs."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
