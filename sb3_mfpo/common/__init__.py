"""Maths, modules and plumbing that the algorithms of this package share."""
