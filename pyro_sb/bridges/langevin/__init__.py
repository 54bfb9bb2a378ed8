"""The kernel-Langevin bridge: from draws alone, without a network (arXiv 2401.04372)."""
