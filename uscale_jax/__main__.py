"""Entry point of ``python -m uscale_jax``."""

import sys

from uscale_jax._command_line import main

if __name__ == "__main__":
    sys.exit(main())
