"""Weights to and from Hugging Face: tables of two-way slicing rules, proved to use every element once."""

from megatron_vita.convert.opening import OpenModel, open_model

__all__ = ["OpenModel", "open_model"]
