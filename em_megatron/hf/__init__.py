"""The model and its tokenizer as Hugging Face files."""
