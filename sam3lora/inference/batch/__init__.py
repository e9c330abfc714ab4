"""Prompts on very many images, on Ray Data."""
