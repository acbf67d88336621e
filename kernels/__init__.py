"""Device code and what launches it; knows nothing of autograd."""
