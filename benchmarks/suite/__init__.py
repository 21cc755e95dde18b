"""One module per benchmark; each defines ``BENCHMARK`` and is found by its presence here."""
