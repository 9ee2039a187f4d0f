"""The application: a recipe in, a plain Hugging Face checkpoint out. Importing it loads no training framework."""
