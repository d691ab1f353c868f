"""Guesses of the tokens to come, which the next step verifies. Importing this package imports no torch; `mtp` does."""
