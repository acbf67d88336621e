"""The evaluation of Xu et al. 2015 (arXiv 1505.00853), reproducible on the toolkit."""
