"""The networks, and the ways to run them."""
