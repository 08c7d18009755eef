"""Decoding: ids and image embeddings in, ids out. No strings, no tokenizer, no HTTP."""
