"""Benchmarks: workloads, the images that they work on, peers, ceilings, and the report (docs/BENCHMARKS.md)."""
