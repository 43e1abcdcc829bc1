"""Fused softmax attention: dense and packed (varlen), forward and backward."""
