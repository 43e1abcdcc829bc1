"""Linear layer + activation, and the feed-forward block of a Transformer."""
