"""Entry point of ``python -m benchmarks``."""

import os
import sys

from benchmarks.cli import INTERRUPTED, main

if __name__ == "__main__":
    code = main()
    if code == INTERRUPTED:
        # The interrupted computation may still be running in XLA's threads, and Python's orderly
        # exit would free memory under them. All files are whole already; leave at once.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
