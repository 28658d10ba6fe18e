"""Weights to and from Hugging Face: tables of two-way slicing rules, proved to use every element once."""

from megatron_vita.convert.opening import OpenModel, load_hf_for_inference, open_model

__all__ = ["OpenModel", "load_hf_for_inference", "open_model"]
