"""The application: a recipe in, a plain Hugging Face checkpoint out."""
