"""Tiny UNets in styles that no library class covers; every module is random and deterministic."""
