"""Estimates from the draws of a sampler: covariances from draws and gradients, shares of modes."""
