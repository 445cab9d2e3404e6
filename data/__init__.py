"""LightningDataModules, one for each data.kind."""
