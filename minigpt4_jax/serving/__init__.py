"""An OpenAI-compatible server on one engine, and the page that people chat on."""
