"""N-view InfoNCE."""
