"""Published benchmarks: their files as they are downloaded become questions."""

from __future__ import annotations

from megatron_vita.evaluation.benchmarks.prompts import STYLES
from megatron_vita.evaluation.benchmarks.read import benchmark_set, find_benchmark, read_benchmark
from megatron_vita.evaluation.benchmarks.table import BENCHMARKS, Benchmark

__all__ = ["BENCHMARKS", "STYLES", "Benchmark", "benchmark_set", "find_benchmark", "read_benchmark"]
