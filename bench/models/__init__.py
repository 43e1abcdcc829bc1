"""Whole layers and models, from torch.nn's constructors or from ours."""
