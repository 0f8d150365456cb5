"""Tasks of language models: adapters."""
