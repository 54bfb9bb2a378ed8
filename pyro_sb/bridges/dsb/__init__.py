"""Diffusion Schrödinger bridge between any two laws (arXiv 2106.01357, 2303.16852)."""
