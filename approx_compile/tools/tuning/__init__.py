"""`tune`: find the approximation of every layer that saves most time within an error budget."""
