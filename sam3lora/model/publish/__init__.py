"""Publishing: export of merged models, model cards, upload to the Hugging Face hub."""
