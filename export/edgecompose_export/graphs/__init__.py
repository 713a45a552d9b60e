"""ONNX graphs: decoders and their weights, fuse graphs, and the merge graphs of the runtime."""
