"""Pure quantization numerics on torch tensors; imports nothing else of the package but its errors."""
