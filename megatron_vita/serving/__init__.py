"""OpenAI's HTTP API over the engine, for people and for benchmark harnesses; its web page and metrics."""
