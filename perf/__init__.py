"""Throughput profiling: workloads, peers, measuring, static inspection, reports."""
