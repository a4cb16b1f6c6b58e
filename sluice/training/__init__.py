"""Recipes and NeMo AutoModel fine-tuning."""
