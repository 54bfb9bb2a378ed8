"""ArviZ containers of finished runs."""
