"""Fuzzing: thousands of damaged inputs, each of which is either taken for what it is or refused in one line."""
