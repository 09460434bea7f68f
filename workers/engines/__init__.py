"""Engines: where tasks run. ``base`` says what every engine promises."""
