"""Command line and conf files -> checked dataclasses."""
