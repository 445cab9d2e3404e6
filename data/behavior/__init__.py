"""User event logs: events, their text, questions about them."""
