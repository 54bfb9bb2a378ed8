"""Power tails around any bridge."""
