"""Hugging Face checkpoints, configs and adapters, in and out."""
