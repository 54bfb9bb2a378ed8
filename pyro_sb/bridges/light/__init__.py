"""Light bridges: one Gaussian-mixture potential (arXiv 2310.01174, 2402.03207, 2601.19312)."""
