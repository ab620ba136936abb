"""Who may do what: API keys, rates, and signed tokens for those without a key."""
