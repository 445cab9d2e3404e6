"""What evaluation measures; each a torchmetrics.Metric."""
