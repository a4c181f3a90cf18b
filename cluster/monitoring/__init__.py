"""Whoever listens to events: bars, TensorBoard, MLflow, Prometheus, status."""
