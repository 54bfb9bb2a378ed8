"""Diffusions whose noising is known: VSDM, SGM (arXiv 2405.04795) and SmoothedBridge (2404.13309)."""
