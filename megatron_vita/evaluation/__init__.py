"""Benchmarks: questions with reference answers, tasks that judge answers, results that survive a kill, tables."""
