"""The gateway: HTTP, SSE and WebSocket in, jobs and events over Redis out. Never imports torch."""
