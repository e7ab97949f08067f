"""`explain`: report what would be approximated and why, as tables, as plain values and as an HTML page."""
