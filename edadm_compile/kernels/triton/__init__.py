"""Triton device code, one file per kernel; imported only to compile or to interpret."""
