"""Passing models on: export, model cards, the Hugging Face hub, parameter tables."""
