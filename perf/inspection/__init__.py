"""Machine code: the kernels compiled for GPUs that need not be there, counted and held to recorded figures."""
