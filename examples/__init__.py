"""Examples: minimal.py first, then the demo (train.py with trainer.py and plots.py, its data sets and models)."""
