"""A process that is killed while it writes a model directory: ``python -m tests.hf_worker``."""

import os
import signal
import sys
from pathlib import Path

from tests.hf_directories import planned
from uscale_jax import _hf as hf
from uscale_jax import _hf_write


def main(source: str, target: str, files: str) -> None:
    """Kills this process when so many files have been begun."""
    begun = 0
    write_file, write_config = _hf_write.write_weights, _hf_write.write_config

    def weights(folder, tensors, value, metadata, largest):
        def counted(name):
            nonlocal begun
            if begun == int(files):
                os.kill(os.getpid(), signal.SIGKILL)
            begun += 1
            return value(name)

        write_file(folder, tensors, counted, metadata, largest)

    def config(raw, path):
        if int(files) < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        write_config(raw, path)

    _hf_write.write_weights, _hf_write.write_config = weights, config
    hf.grow(source, target, planned(Path(source)), verify=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
