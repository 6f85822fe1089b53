"""The runtime: instances, their records, and what can be done with them."""
