"""The mode audit: shares of modes in two independent populations."""
