"""BYOL's regression loss."""
