"""`explain`: what would be approximated and why, as tables, plain values and a page."""
