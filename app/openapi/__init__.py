"""`/openapi.json`, exact, and the tables of docs/api.md that are made from it."""
