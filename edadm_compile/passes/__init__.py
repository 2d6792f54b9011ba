"""Compiler passes. Their order lives in `edadm_compile.pipeline` and nowhere else."""
