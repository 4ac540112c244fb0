"""Suites and data modules: what pruners are trained on and measured with."""
