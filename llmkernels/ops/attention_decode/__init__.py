"""Attention of a few new tokens over a key-value cache, contiguous or paged, with append."""
