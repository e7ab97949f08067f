"""`tune`: the approximation of every layer that a time budget or an error budget buys."""
