"""analyze: contexts become risk events, judged by an LLM behind an OpenAI-compatible server."""
