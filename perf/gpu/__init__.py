"""The steps of `python -m fused_rect.perf.gpu_check`: what only a GPU can show."""
