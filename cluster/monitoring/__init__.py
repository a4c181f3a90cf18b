"""The listeners to a run's events: bars, TensorBoard, MLflow, Prometheus, status."""
