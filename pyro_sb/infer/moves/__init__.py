"""Metropolis moves of many chains, and their tuning."""
