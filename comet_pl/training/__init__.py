"""The LightningModule, its chunk loop and its optimizer."""
