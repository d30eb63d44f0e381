"""``python -m kvmesh.cli``: the same as ``kvmesh``, for where the script is not on the path."""

import sys

from .entry import main

if __name__ == "__main__":
    sys.exit(main())
