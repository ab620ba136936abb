"""What surrounds every request on the wire, whatever its route."""
