"""`python -m gpucache_pipes`."""

import sys

from gpucache_pipes.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
