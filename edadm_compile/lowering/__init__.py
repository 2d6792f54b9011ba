"""From the lowered program to launch plans: rewrites, grouping into kernels, memory, tiles."""
