"""Answers from a model: engine (prefill, cache, decode), sampling, evaluation."""
