"""Several processes that work on one compilation: who holds which rows, and how they come to one result."""
