"""LayerNorm, residual + dropout + LayerNorm, RMSNorm."""
