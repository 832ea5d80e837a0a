"""One trial configuration in, metrics and files out; knows nothing of Ray, MLflow or sweeps."""
