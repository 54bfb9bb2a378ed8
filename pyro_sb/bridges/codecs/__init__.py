"""Codecs: maps between data and latents."""
