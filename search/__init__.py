"""PROPOSE: Optuna studies over token schedules, from a job's description to its Pareto front."""
