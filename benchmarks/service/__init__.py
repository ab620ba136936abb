"""The service against others: the program, and the two servers beside it."""
