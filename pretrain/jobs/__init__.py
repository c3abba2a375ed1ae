"""A run as a job of a cluster: what was submitted, how each of its starts ended, and whether it goes on."""
