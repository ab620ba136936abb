"""Live sockets: who comes in, what is said, what waits to be sent, and the session itself."""
