"""`python -m memtrain` is `memtrain`."""

import sys

from memtrain.cli import main


if __name__ == "__main__":
    sys.exit(main())
