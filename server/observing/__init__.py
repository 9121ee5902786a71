"""What is told of the work: metrics, statistics, logs, traces, telemetry."""
