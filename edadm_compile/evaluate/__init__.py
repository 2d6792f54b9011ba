"""Quality metrics and same-noise comparison of two models."""
