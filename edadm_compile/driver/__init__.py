"""The verbs of the command line as library functions: load, work, write, return plain results."""
