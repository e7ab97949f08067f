"""Token rows: the backward pass of a region of the graph on some of its (sample, token) entries. See README.md."""
