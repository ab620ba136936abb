"""What gateway and worker agree on, and the only thing they share: messages, and the queue that carries them."""
