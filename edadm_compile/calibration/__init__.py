"""Calibration data: sampling with diffusers schedulers and the choice of samples (TDAC)."""
