"""What can be served, and how it is made."""
