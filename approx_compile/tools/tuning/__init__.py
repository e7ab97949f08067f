"""`tune`: find for every layer the approximation that together saves the most time within an error budget."""
