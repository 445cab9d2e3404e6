"""`python -m benchmarks.gpu`: benchmarks/gpu/driver.py."""

from benchmarks.gpu.driver import main

__all__ = ["main"]
