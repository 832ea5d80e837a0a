"""Which benchmarks exist, and what each one measures; nothing heavy is imported."""

from __future__ import annotations

# Name → "module:function"; the function takes Settings and returns a Report (benchmarks/report.py).
BENCHMARKS = {
    "startup": "benchmarks.startup:measure",  # the command line, against seconds
    "token_statistics": "benchmarks.token_statistics:measure",  # against the training step without them
    "trainer_throughput": "benchmarks.trainer_throughput:measure",  # training step, against others' loops
    "input_path": "benchmarks.input_path:measure",  # from files to views, against torchvision's loader
    "machine_share": "benchmarks.machine_share:measure",  # training step, against what the cores can do
    "sweep_overhead": "benchmarks.sweep_overhead:measure",  # a sweep, against trials in a bare loop
    "logistic_regression": "benchmarks.logistic_regression:measure",  # all C of a protocol, against scikit-learn
    "linear_heads": "benchmarks.linear_heads:measure",  # 52 heads at once, against one
    "fast_probes": "benchmarks.fast_probes:measure",  # all probes of a trial, against a minute
    "coverage": "benchmarks.coverage:measure",  # intervals and claims of simulated sweeps, against what they promise
    "bands": "benchmarks.bands:measure",  # bands over all thresholds, and elimination, against what they promise
    "scale": "benchmarks.scale:measure",  # thousands of trials, against bare Ray Tune
    "busy_slots": "benchmarks.busy_slots:measure",  # trials of 20 s on 16 slots, against all slot time
    "mixed_sizes": "benchmarks.mixed_sizes:measure",  # fractions of a GPU up to four, against all GPUs
    "restart": "benchmarks.restart:measure",  # a sweep with thousands of finished trials, against seconds
    "trial_turnaround": "benchmarks.trial_turnaround:measure",  # no-op trials, against fresh processes
    "analysis_tables": "benchmarks.analysis_tables:measure",  # a sweep's tables, against MLflow's own calls
}
