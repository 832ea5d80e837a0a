"""The sweep file, the plan, Ray Tune, MLflow and the command line."""
