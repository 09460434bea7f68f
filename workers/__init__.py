"""Measure and train: tasks, and the engines that place them on devices."""
