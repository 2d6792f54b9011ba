"""Programs as ONNX graphs: QDQ form, fused by ONNX Runtime into integer kernels."""
