"""The one loop, the optimizer, checkpoints. Knows no algorithm: alarms, evaluators and trackers are observers."""
