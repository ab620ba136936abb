"""What the gateway itself costs: the program, its clients, and a worker that takes no time."""
