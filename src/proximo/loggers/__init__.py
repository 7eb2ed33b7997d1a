"""Metrics for TensorBoard, Weights & Biases and Trackio: all read them from a run's metrics.jsonl."""
