"""The latent bridge: any bridge in the latent space of a codec (arXiv 2404.13309)."""
