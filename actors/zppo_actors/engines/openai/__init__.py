"""Teachers behind an OpenAI-compatible server."""
