"""Conversations with a memory, and the models that hold them."""
