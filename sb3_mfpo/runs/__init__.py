"""Runs that can be stopped and resumed: checkpoints of all that a training consists of."""
