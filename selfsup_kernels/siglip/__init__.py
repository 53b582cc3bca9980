"""The pairwise sigmoid loss of SigLIP (arXiv:2303.15343)."""
