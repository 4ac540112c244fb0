"""lmms-eval, driven for several pruners and budgets, and what it said as a record."""
