"""The README's claims, measured: a folder a claim; their table is `claims.py`, their runner `python -m benchmarks`."""
