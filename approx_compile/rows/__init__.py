"""The row-sampled backward pass: where samples lie in every tensor, how the graph is cut, compiled, run and controlled."""
