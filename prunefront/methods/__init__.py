"""One file per paper: how its operations choose and combine tokens."""
