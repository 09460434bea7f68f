"""Data, recipes, losses, evaluation and fine-tuning: what ``train`` and ``eval`` run, and what tasks call."""
