"""Which benchmarks exist, and what each one measures; nothing heavy is imported."""

from __future__ import annotations

# Name → "module:function"; the function takes Settings and returns a Report (benchmarks/report.py).
BENCHMARKS = {
    "startup": "benchmarks.startup:measure",  # the command line, against seconds
    "token_statistics": "benchmarks.token_statistics:measure",  # against the training step without them
    "trainer_throughput": "benchmarks.trainer_throughput:measure",  # training step, against others' loops
    "machine_share": "benchmarks.machine_share:measure",  # training step, against what the cores can do
    "sweep_overhead": "benchmarks.sweep_overhead:measure",  # a sweep, against trials in a bare loop
    "logistic_regression": "benchmarks.logistic_regression:measure",  # all C of a protocol, against scikit-learn
    "trial_turnaround": "benchmarks.trial_turnaround:measure",  # no-op trials, against fresh processes
}
