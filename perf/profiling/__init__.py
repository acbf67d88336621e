"""Throughput: workloads and peers, measured side by side in processes of their own, as records, reports and pages."""
