"""Parity of the parallel model: a grid of layouts, compared with a reference implementation in one process."""
