"""Is the parallel model the same model? A grid of layouts against one process of plain PyTorch."""
