"""Measurements beside Inductor; README.md says what each shows and which file of results it writes."""
