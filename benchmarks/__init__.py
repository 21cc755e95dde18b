"""Benchmarks of ``uscale_jax``; run them with ``python -m benchmarks``."""
