"""telemetry: what this host's NVIDIA GPUs say of themselves, to `gpu_metrics` and to Prometheus."""
