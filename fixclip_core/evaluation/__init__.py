"""Retrieval and zero-shot classification, and the benchmarks that are commonly reported."""
