"""Side-by-side measurements; each is one command and prints a table."""
